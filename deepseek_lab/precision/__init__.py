"""What low precision keeps and loses: number formats, scales, FP8 products and the layer made of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "formats": ["BF16", "E4M3", "E5M2", "FORMATS", "FP16", "FP32", "TF32", "FloatFormat", "decode", "encode",
                    "find_format", "round_to"],
        "linear": ["Fp8Linear"],
        "matmul": ["fast_bf16", "fp8_matmul"],
        "policy": ["PrecisionPolicy"],
        "rounding": ["Code", "Rounded", "round_number", "worst_errors"],
        "scaling": ["BLOCK", "BlockScaled", "quantize", "quantize_blocks", "quantize_tensor", "quantize_tiles"],
        "study": ["Outlier", "OutlierStudy", "outlier_study"],
    },
)  # fmt: skip
