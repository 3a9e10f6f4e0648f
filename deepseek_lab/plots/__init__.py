"""Pictures: records or ledgers in, matplotlib Axes out. Nothing here computes a number that it shows."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "absorption": ["absorption_explorer"],
        "accumulation": ["accumulator", "error_curves"],
        "balance": ["balance_theatre"],
        "cache_race": ["cache_race"],
        "course_map": ["COURSE", "course_map"],
        "bits": ["bit_explorer"],
        "fp8_runs": ["run_curves", "token_errors"],
        "formats": ["code_histogram", "format_errors", "format_values", "formats_bar"],
        "outliers": ["error_against_outlier", "outlier_explorer"],
        "speculation": ["speculation_viewer"],
        "style": ["INK", "PALETTE", "use_style"],
        "memory": ["memory_bar"],
        "memory_timeline": ["memory_timeline"],
        "model_map": ["model_map"],
        "paged": ["paged_cache"],
        "parts": ["cache_growth", "parts_bar"],
        "replay": ["training_replay"],
        "roofline": ["roofline"],
        "routes": ["token_router"],
        "tiles": ["shared_scales"],
        "traffic": ["traffic_map"],
        "training": ["load_map", "loss_curve", "schedules"],
    },
)
