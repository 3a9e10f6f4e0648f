"""Multi-head latent attention: many heads, one small memory.

Every head has keys and values of its own, but all of them are rebuilt from one short vector per token, the latent. Only
the latent and one shared rope key are cached. Two ways of computing lead to the same numbers:

expanded  rebuild keys and values for every head, then attend as usual. Best when many tokens are read at once.
absorbed  move the rebuilding matrices to the query and to the output, and attend to the latents themselves. Best when
          one token is written and the cache is long: nothing of per-head width is ever made for the old tokens.

Sources: DeepSeek-V2 report (arXiv 2405.04434), section 2.1 and appendix C; DeepSeek-V3 report, equations 1 to 11. The
RMSNorm on both latents is in the text and the released code; its epsilon there is always 1e-6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.dispatch import body_for
from ..precision.linear import input_in_use, weight_in_use
from .caches import ExpandedCache, LatentCache
from .fp8_cache import Fp8LatentCache
from .masks import causal_mask, check_positions
from .norm import RMSNorm
from .rope import RotaryTable, rotate_halves, rotate_pairs, softmax_scale, turns_of_heads

LATENT_EPS = 1e-6
FEW = 4  # new tokens that read a memory absorbed; expanded attention rebuilds all of it for them


class LatentAttention(nn.Module):
    """MLA with decoupled rotary positions, with or without a query latent (`q_lora_rank`).

    forward(x [batch, token, hidden], positions [token] or [batch, token], cache=None, absorb=None, hidden=None)
    -> [batch, token, hidden].
    absorb: True or False picks the way of computing; None takes the absorbed one with a cache of latents, for a single
    token or for a few behind others. hidden [batch, slot]: which slots of the cache, new ones included, are
    padding; see `masks`.
    Raises ValueError, with the cache as it was, for positions that go back, a cache of another model or batch, and
    absorb=True where the cache holds keys and values: these are rebuilt, there is no latent left to attend to.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.uses_latent_attention:
            raise ValueError(
                "LatentAttention needs kv_lora_rank, which this config lacks; use GroupedAttention(config)"
            )
        self.config = c = config
        d, heads = c.hidden_size, c.num_attention_heads
        if c.q_lora_rank:
            self.q_a_proj = nn.Linear(d, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(d, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, c.latent_width, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, d, bias=False)
        self.rotary = RotaryTable(config)
        self.rotate = rotate_pairs if c.rope_interleave else rotate_halves
        self.scale = softmax_scale(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: LatentCache | Fp8LatentCache | ExpandedCache | None = None,
        absorb: bool | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        rebuilt = isinstance(cache, ExpandedCache)
        if absorb and rebuilt:
            raise ValueError("absorb=True with an ExpandedCache, which holds keys and values and no latents; pass "
                             "absorb=False, or a cache of latents (layout 'latent')")  # fmt: skip
        mask = causal_mask(x, x.shape[1] + (cache.length if cache is not None else 0), hidden)
        check_positions(x, positions, cache, hidden)
        rank = self.config.kv_lora_rank
        if (kept := getattr(cache, "kv_lora_rank", rank)) != rank:
            raise ValueError(f"the cache keeps latents of {kept} numbers, this attention has {rank}; a cache serves "
                             "one model, layout and batch size, make a new one for another")  # fmt: skip
        q_nope, q_rope, memory = self._project(x, positions)
        if absorb is None:
            few = x.shape[1] == 1 or (x.shape[1] <= FEW and cache is not None and cache.length > 0)
            absorb = few and cache is not None and not rebuilt
        if rebuilt:
            k, v = self._rebuild(memory)
            memory = tuple(kept.to(x.dtype) for kept in cache.append(k.to(cache.dtype), v.to(cache.dtype)))
        elif absorb and hidden is None and self._is_read_as_stored(x, cache):
            cache.store(memory.to(cache.dtype))
            return self.o_proj(self._values(self._mix_by_kernel(self._absorb(q_nope, q_rope), cache)))
        elif cache is not None:
            memory = cache.append(memory.to(cache.dtype)).to(x.dtype)
        attend = self._attend_absorbed if absorb else self._attend_expanded
        return self.o_proj(attend(mask, q_nope, q_rope, memory))

    def round_core(self, x: Tensor) -> Tensor:
        """What becomes of queries, keys and values [..., channel] before they meet; see `model.apply_policy`.

        Absorbed queries and latents are other vectors: where something is rounded here, the two ways differ.
        """
        return x

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries without and with position [batch, head, token, .], and what is cached [batch, token, .]."""
        c = self.config
        turns = self.rotary(positions)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).transpose(1, 2)  # [batch, head, token, head_dim]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, rope_key = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        # The latent is normalised, the rope key is not, as in the released code.
        joint = torch.cat([self.kv_a_layernorm(latent), self.rotate(rope_key, turns)], dim=-1)
        return q_nope, self.rotate(q_rope, turns_of_heads(turns)), joint

    def _rebuild(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of every head [batch, head, token, .] from latents and rope keys."""
        c = self.config
        latent, rope_key = joint.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return torch.cat([k_nope, rope_key[:, None].expand(-1, c.num_attention_heads, -1, -1)], dim=-1), v

    def _attend_expanded(self, mask: dict, q_nope: Tensor, q_rope: Tensor, memory: Tensor | tuple) -> Tensor:
        """Attend with keys and values per head; memory: latents and rope keys, or the keys and values themselves."""
        c = self.config
        k, v = self._rebuild(memory) if isinstance(memory, Tensor) else memory
        q = torch.cat([q_nope, q_rope], dim=-1)
        q, k, v = self.round_core(q), self.round_core(k), self.round_core(v)
        # Torch's fused kernel wants values as wide as keys; columns of zeros change nothing and are cut off again.
        v = F.pad(v, (0, max(c.qk_head_dim - c.v_head_dim, 0)))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, **mask)
        return out[..., : c.v_head_dim].transpose(1, 2).flatten(2)

    def _attend_absorbed(self, mask: dict, q_nope: Tensor, q_rope: Tensor, joint: Tensor) -> Tensor:
        c = self.config
        B, H, T, _ = q_nope.shape
        latent, rope_key = joint.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        read = input_in_use(self.kv_b_proj, latent)  # what expanded attention would rebuild keys and values from
        joint = joint if read is latent else torch.cat([read, rope_key], dim=-1)
        q, joint = self.round_core(self._absorb(q_nope, q_rope)), self.round_core(joint)
        scores = torch.bmm(q.flatten(1, 2), joint.transpose(1, 2)).view(B, H, T, -1) * self.scale
        if mask:
            allowed = mask.get("attn_mask", scores.new_ones(T, T, dtype=torch.bool).tril())
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(joint.dtype)
        mixed = torch.bmm(weights.view(B, H * T, -1), joint[..., : c.kv_lora_rank])  # one latent per head and token
        return self._values(mixed.view(B, H, T, -1))

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Return queries that ask latents and rope keys: [batch, head, token, latent + rope]."""
        w_uk, _ = self._rebuilding()
        B, H, T, _ = q_nope.shape
        # q_nope . (W_UK latent) = (W_UK^T q_nope) . latent: the query carries the matrix, the memory stays small.
        q_latent = torch.bmm(q_nope.transpose(0, 1).reshape(H, B * T, -1), w_uk).view(H, B, T, -1).transpose(0, 1)
        return torch.cat([q_latent, q_rope], dim=-1)

    def _values(self, mixed: Tensor) -> Tensor:
        """Rebuild every head's value from its mixed latent [batch, head, token, latent]: [batch, token, head * v]."""
        _, w_uv = self._rebuilding()
        B, H, T, _ = mixed.shape
        out = torch.bmm(mixed.transpose(0, 1).reshape(H, B * T, -1), w_uv.transpose(1, 2))  # [head, batch * token, v]
        return out.view(H, B, T, -1).permute(1, 2, 0, 3).flatten(2)

    def _rebuilding(self) -> tuple[Tensor, Tensor]:
        """Return W_UK [head, nope, latent] and W_UV [head, v, latent]."""
        c = self.config
        rebuild = weight_in_use(self.kv_b_proj).unflatten(0, (c.num_attention_heads, -1))
        return rebuild.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)

    def _is_read_as_stored(self, x: Tensor, cache) -> bool:
        """Whether a kernel can read the memory in its eight or sixteen bits, instead of a copy made of 32.

        It rounds nothing on the way, knows no gradients, and takes float32 tokens one by one.
        """
        narrow = isinstance(cache, Fp8LatentCache) or (isinstance(cache, LatentCache) and cache.dtype == torch.bfloat16)
        few = x.shape[1] <= FEW and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        rounds = type(self).round_core is not LatentAttention.round_core or hasattr(self.kv_b_proj, "policy")
        return narrow and few and not rounds and not torch.is_grad_enabled()

    def _mix_by_kernel(self, q: Tensor, cache) -> Tensor:
        """Return a latent for every head [batch, head, token, latent]; q: [batch, head, token, latent + rope]."""
        body, ends = body_for(q), range(cache.length - q.shape[2] + 1, cache.length + 1)  # each sees up to itself
        tokens = zip((one.contiguous() for one in q.unbind(2)), ends, strict=True)
        if isinstance(cache, Fp8LatentCache):
            mixed = [body.decode_attention_fp8(one, *cache.parts(), end, self.scale) for one, end in tokens]
        else:
            rank = self.config.kv_lora_rank
            mixed = [body.decode_attention(one, *cache.view(), end, self.scale, rank) for one, end in tokens]
        return torch.stack(mixed, dim=2)
