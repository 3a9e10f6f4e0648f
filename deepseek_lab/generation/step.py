"""The step that writes a token: by the model itself, or by compiled kernels where these can serve the model.

A small model spends most of a step on starting torch's operations, not on its weights. The kernels read the same
weights where they lie, in one call per half of a layer. They serve what they know exactly: float32 on a CPU, latent
attention with rotary pairs, the modules of this library as they are. Whatever else comes takes the model's own path.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.caches import LatentCache, check_new
from ..kernels import active, body
from ..model import Transformer
from ..model.layer import Layer
from ..model.multi_token import MultiTokenModule
from .arrays import Arrays, Unsupported, expect

# The kernels read a weight once for two rows of the batch, torch's matrix products once per batch. When they still read
# it once per row, they were faster up to 64 rows of 256 values, 16 of 512 and 4 of 1024, on one thread.
LARGEST_WORK = 64 * 256**2  # rows * hidden_size ** 2


class ModelStep:
    """The definition of right: step(tokens [batch], caches) -> logits [batch, vocab], by the model itself.

    hidden [batch, slot] bool: which slots are padding, as many slots as will ever be needed; see `Transformer`.
    """

    def __init__(self, model: Transformer, hidden: Tensor | None = None):
        self._model, self._hidden = model, hidden

    def __call__(self, tokens: Tensor, caches: list) -> Tensor:
        hidden = None if self._hidden is None else self._hidden[:, : caches[0].length + 1]
        with torch.inference_mode():
            return self._model(tokens[:, None], caches, hidden)[:, -1]

    def read(self, tokens: Tensor, caches: list) -> tuple[Tensor, Tensor]:
        """Read tokens [batch, token] and return logits [batch, token, vocab] and states, as the model's `read`."""
        with torch.inference_mode():
            return self._model.read(tokens, caches)

    def draft(self, index: int, states: Tensor, tokens: Tensor, cache) -> tuple[Tensor, Tensor]:
        """Let a module (0 is the first) read on, tokens [batch, token] with states [batch, token, hidden] of the depth
        before; return the logits of the last token [batch, vocab], and the states that the next module needs.
        """
        model, start = self._model, cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        with torch.inference_mode():
            states = model.multi_token[index](states, model.embed_tokens(tokens), positions, cache)
            return model.lm_head(states[:, -1]), states


class CompiledStep:
    """The same as `ModelStep` within float32 rounding, by compiled kernels; sums run in another order.

    What is computed of a token does not depend on how many tokens are read at once, in any bit. The step holds views
    on the weights, no copies: a training step in place shows at once, and no memory is taken. Once the model itself
    was changed (`model.to(...)`, a weight or a module replaced) the step must be made anew.
    Raises Unsupported where it cannot stand in for the model.
    """

    def __init__(self, model: Transformer, kernels: ModuleType):
        self._model, self._kernels = expect(model, Transformer), kernels
        c, arrays = model.config, Arrays(model.config, kernels)
        self._embedding = arrays.array(expect(model.embed_tokens, nn.Embedding).weight, c.vocab_size, c.hidden_size)
        modules = [expect(module, MultiTokenModule) for module in model.multi_token]
        layers = [expect(layer, Layer) for layer in model.layers] + modules
        self._attention = [arrays.attention(layer) for layer in layers]
        self._rotary = [(layer.self_attn.rotary, layer.self_attn.scale) for layer in layers]
        self._turns: list[np.ndarray] = []
        self._feed_forward = [arrays.feed_forward(layer) for layer in layers]
        self._head = arrays.weight(model.lm_head, c.vocab_size, c.hidden_size)
        self._norm = arrays.norm(model.norm, c.hidden_size)
        self._modules = [arrays.module(module) for module in modules]

    def __call__(self, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        if tokens.dim() != 1:
            raise ValueError(f"a step got tokens of shape {tuple(tokens.shape)}; expected [batch]")
        return self.read(tokens[:, None], caches)[0][:, 0]

    def read(self, tokens: Tensor, caches: list[LatentCache]) -> tuple[Tensor, Tensor]:
        """As `ModelStep.read`. The kernels read a weight once for all tokens."""
        memories, length = self._check(tokens, caches, self._model._start(caches))
        x = self._embed(tokens)
        for layer, memory in enumerate(memories):
            self._run(layer, x, memory, length)
        return self._finish(x, self._norm, tokens, caches, memories, length)

    def draft(self, index: int, states: Tensor, tokens: Tensor, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """As `ModelStep.draft`. The last module only stores what later tokens look back to, but for the last token."""
        memories, length = self._check(tokens, [cache], cache.length)
        (join, norm), layer = self._modules[index], len(self._model.layers) + index
        before = np.ascontiguousarray(states.numpy().swapaxes(0, 1)).reshape(-1, states.shape[-1])
        x = self._kernels.join(before, self._embed(tokens), *join)
        last = index + 1 == len(self._modules)
        x = self._run(layer, x, memories[0], length, len(x) - len(tokens) if last else 0)
        logits, states = self._finish(x, norm, tokens, [cache], memories, length)
        return logits[:, -1], states

    def _embed(self, tokens: Tensor) -> np.ndarray:
        """Return [row, hidden], a copy that the kernels add to; rows: the first token of every text, the second, ..."""
        return self._embedding.take(tokens.numpy().T.ravel(), axis=0)

    def _run(self, layer: int, x: np.ndarray, memory: np.ndarray, length: int, first: int = 0) -> np.ndarray:
        """Let a layer read all rows of x, and return the rows from `first` on as it leaves them."""
        turns = self._turns[layer][length : length + len(x) // len(memory)]
        self._kernels.attention(x, *self._attention[layer], turns, memory, length, self._rotary[layer][1], first)
        self._feed_forward[layer](x[first:])
        return x[first:]

    def _finish(self, x, norm, tokens: Tensor, caches: list, memories: list, length: int) -> tuple[Tensor, Tensor]:
        """Return logits and states [batch, token, .], and let the caches keep what was written, if it is sound."""
        end = length + tokens.shape[1]
        if not all(np.isfinite(memory[:, length:end]).all() for memory in memories):
            for cache, memory in zip(caches, memories, strict=True):
                check_new(cache, (torch.from_numpy(memory[:, length:end]),), cache._expected, cache.dtype)
        rows = self._kernels.logits(x, *norm, self._head)
        for cache in caches:  # only now: an interrupted step leaves no layer a token ahead of another
            cache.length = end
        logits, states = (
            torch.from_numpy(part.reshape(-1, len(tokens), part.shape[1]).swapaxes(0, 1)) for part in rows
        )
        return logits, states

    # What a kernel may not be given wrong, because it does not check -----------------------------------------------

    def _check(self, tokens: Tensor, caches: list[LatentCache], length: int) -> tuple[list[np.ndarray], int]:
        """Refuse what the kernels would misread; return the caches' buffers, with room for the tokens, and `length`."""
        if tokens.device.type != "cpu" or min(tokens.shape) > 1:
            raise ValueError(f"a step got tokens of shape {tuple(tokens.shape)} on {tokens.device}; expected one of "
                             "each text [batch, 1], or several of one [1, token], on cpu")  # fmt: skip
        c, ids, end = self._model.config, tokens.numpy().ravel().tolist(), length + tokens.shape[1]
        if end > c.max_position_embeddings or min(ids) < 0 or max(ids) >= c.vocab_size:
            self._model._check(tokens, length)  # says what is wrong
        expected = len(tokens), c.latent_width
        memories = []
        for cache in caches:
            if type(cache) is not LatentCache or cache.dtype != torch.float32 or cache.length != length:
                raise ValueError(f"a step got a {type(cache).__name__} of {cache.dtype} and length {cache.length}; "
                                 f"expected a float32 LatentCache of length {length} (model.new_caches)")  # fmt: skip
            memory = cache.reserve(tokens.shape[1])[0].detach().numpy()  # [batch, capacity, latent + rope]
            if (memory.shape[0], memory.shape[2]) != expected:
                raise ValueError(f"a cache holds [batch, width] {memory.shape[::2]}, this step needs {expected}; "
                                 f"make new ones with model.new_caches(batch={len(tokens)})")  # fmt: skip
            memories.append(memory)
        if not self._turns or end > len(self._turns[0]):
            positions = torch.arange(max(2 * end, 256))
            self._turns = [torch.view_as_real(rotary(positions)).numpy() for rotary, _ in self._rotary]
        return memories, length


def decode_step(
    model: Transformer, batch: int, caches: list | None = None, hidden: Tensor | None = None
) -> ModelStep | CompiledStep:
    """Return what writes the next token of `batch` texts fastest: compiled kernels where they serve, else the model.

    The kernels know float32 latents side by side, and texts of equal length: where `caches` (None: the model's own
    kind) are others, or some slots are `hidden`, the model itself is returned.
    """
    small = batch * model.config.hidden_size**2 <= LARGEST_WORK
    plain = hidden is None and all(type(c) is LatentCache and c.dtype == torch.float32 for c in caches or ())
    known = plain and model.config.uses_latent_attention and not torch.is_autocast_enabled("cpu")
    if active() == "numba" and small and known:
        with contextlib.suppress(Unsupported):
            return CompiledStep(model, body())
    return ModelStep(model, hidden)
