"""Exercises of notebook 00, start here."""

from . import Exercise, Slip, same_letter, same_number

EXERCISES = {
    "00.1": Exercise(
        todo="How many bytes does one token leave in DeepSeek-V3's latent cache, over all 61 layers, in BF16?",
        solution=61 * (512 + 64) * 2,
        agrees=same_number,
        praise="61 layers, 512 + 64 values, 2 bytes each: 70,272 bytes, the figure that DeepSeek published.",
        slips=(
            Slip(61 * (512 + 64), "That counts values. A BF16 value takes two bytes."),
            Slip(61 * 512 * 2, "The latent alone is not enough: 64 values of rope key are cached beside it."),
            Slip(61 * 2 * 512 * 2, "One latent serves keys and values alike; it is stored once, not twice."),
            Slip((512 + 64) * 2, "That is one layer. Every one of the 61 layers keeps its own."),
        ),
        fallback="Count the values that one layer keeps (latent and rope key), then the bytes, then the layers.",
    ),
    "00.2": Exercise(
        todo="How many GPUs of 80 GB are needed just to hold DeepSeek-V3's published FP8 weights (673.15 GB)?",
        solution=9,
        agrees=same_number,
        praise="673.15 / 80 is 8.4, so nine; the cache is not even in yet, and GPUs come eight to a node.",
        slips=(
            Slip(8, "8 x 80 GB are 640 GB. Some 33 GB would be left outside: round up, not down."),
            Slip(16, "That is what one buys, two machines of eight. How many does it take to hold the weights?"),
            Slip(10, "That includes the cache of the picture above; here the weights stand alone."),
            Slip(17, "That holds the BF16 weights. The published ones are FP8: about one byte per parameter."),
            Slip(1, "37 B parameters are active for one token, but the next token picks others: all must be stored."),
        ),
        fallback="Divide the bytes of the weights by the bytes of one GPU and round up.",
    ),
    "00.3": Exercise(
        todo="How many experts does one token visit on its way through DeepSeek-V3, shared ones included?",
        solution=58 * 9,
        agrees=same_number,
        praise="58 layers have experts, and in each the token meets eight routed ones and the shared one: 522.",
        slips=(
            Slip(61 * 9, "The first three of the 61 layers are dense: they have no experts."),
            Slip(58 * 8, "Eight are routed; the shared expert, which every token meets, comes on top."),
            Slip(58 * 257, "Those are all experts that exist. A token is sent to eight of 256, and to the shared one."),
            Slip(9, "That is one layer. There are 58 layers with experts."),
        ),
        fallback="Count the layers that have experts, then the experts that one token meets in each.",
    ),
    "00.4": Exercise(
        todo='Which check catches the calculator that says 704 billion? Answer "a", "b" or "c".',
        solution="b",
        praise="Counting one dense layer is enough: three layers with 256 experts each would be 33 billion too many.",
        slips=(
            Slip("a", "Both counts come out near 700: a plausible size proves nothing. Look at one layer."),
            Slip("c", "The cache does not know about experts: it is right in both counts."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
