"""Low-rank adaptation (LoRA, Hu et al. 2022), with rsLoRA, DoRA, PiSSA and LoRA+.

An adapted layer computes ``y = W x + b + s * B A dropout(x)`` with A (r, in) and B (out, r). B starts at zero. The
scaling s is alpha / r, or alpha / sqrt(r) in rsLoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_pl.errors import require
from gpt2_pl.kernels.dropout import dropout_unscaled
from gpt2_pl.kernels.prepacked_linear import cast_to_autocast_dtype
from gpt2_pl.surgery.base import Surgery, freeze_base, merge, unmerge
from gpt2_pl.surgery.targets import TARGETS, AdaptedLinear, Layers, chosen_blocks, plain_layer, target_layers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2


class LoRALinear(AdaptedLinear):
    """Linear layer W with a low-rank update: y = W x + b + s B A dropout(x).

    ``weight`` and ``bias`` are the parameters of the replaced layer, under the same names. A is (n r, in) and B
    (out', r) for n adapted slices of the output; n = 1 if the output is adapted as a whole. A is initialized by
    ``kaiming_uniform_(a=sqrt(5))`` and B by zeros, so that the update is zero at first.

    Args:
        linear: the layer to adapt; its parameters are reused.
        rank: r.
        scaling: s.
        dropout: dropout probability of the adapter's input in training.
        qkv_slices: the slices of the output (0: q, 1: k, 2: v) that are adapted, each with its own A and B; None to
            adapt the output as a whole.
        loraplus_lr_ratio: learning rate of B divided by that of A (LoRA+).
    """

    surgery = "LoRA"

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        qkv_slices: list[int] | None = None,
        loraplus_lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(linear)
        self.rank, self.scaling, self.dropout, self.loraplus_lr_ratio = rank, scaling, dropout, loraplus_lr_ratio
        self.qkv_slices = qkv_slices
        n = 1 if qkv_slices is None else len(qkv_slices)
        rows = self.out_features if qkv_slices is None else n * self.out_features // 3
        self.lora_A = nn.Parameter(self.weight.new_empty(n * rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (n r, in), and B as a block matrix (out, n r) that multiplies the full output of A."""
        return self.lora_A, self._zero_padded(self.lora_B)

    def _zero_padded(self, B: Tensor) -> Tensor:
        if self.qkv_slices is None:
            return B
        height = self.out_features // 3
        padded = B.new_zeros(self.out_features, len(self.qkv_slices) * self.rank)
        for i, index in enumerate(self.qkv_slices):
            block = B[i * height : (i + 1) * height]
            padded[index * height : (index + 1) * height, i * self.rank : (i + 1) * self.rank] = block
        return padded

    def delta_weight(self) -> Tensor:
        """Return the weight update s B A, (out, in)."""
        A, B = self.factors()
        return self.scaling * B @ A

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out,) of the equivalent plain layer."""
        return self.weight + self.delta_weight(), self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Compute W x + b + s B A dropout(x): (..., in) -> (..., out)."""
        x = cast_to_autocast_dtype(input).reshape(-1, self.in_features)  # cast once for both products
        output = self._add_low_rank(x, self._low_rank(x))
        return output.view(*input.shape[:-1], self.out_features)

    def _low_rank(self, x: Tensor) -> Tensor:
        """Compute s A dropout(x): (N, in) -> (N, n r)."""
        dropped, scale = dropout_unscaled(x, self.dropout, self.training)
        return F.linear(dropped, self.lora_A) * (scale * self.scaling)

    def _add_low_rank(self, x: Tensor, low_rank: Tensor) -> Tensor:
        """Compute W x + b + B low_rank: (N, in) and (N, n r) -> (N, out)."""
        output = self.affine(x, self.bias)
        B = self.factors()[1].to(output.dtype)
        return output.addmm_(low_rank, B.T.contiguous())  # contiguous B^T makes the backward pass faster on a CPU


class DoRALinear(LoRALinear):
    """Weight-decomposed LoRA: magnitude and direction of each row are trained apart (Liu et al. 2024, eqs. 5, 11).

    y = g * (W x + s B A dropout(x)) + b with g = m / ||W + s B A||, row by row. The magnitude m, ``lora_magnitude``
    (out',), starts at the norms of the adapted rows of W, so that nothing changes at first. ||W + s B A|| is treated as
    a constant in the backward pass.

    Args:
        linear: the layer to adapt; see :class:`LoRALinear`.
        args: positional arguments of :class:`LoRALinear`.
        kwargs: keyword arguments of :class:`LoRALinear`.
    """

    def __init__(self, linear: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(linear, *args, **kwargs)
        norms = torch.linalg.vector_norm(self.weight.detach(), dim=1).chunk(1 if self.qkv_slices is None else 3)
        self.lora_magnitude = nn.Parameter(torch.cat([norms[i] for i in self.qkv_slices or [0]]))

    def dora_scale(self, norm: Tensor) -> Tensor:
        """Return the factors g (out,) for the row norms (out,) of W + s B A; 1 for rows that are not adapted."""
        if self.qkv_slices is None:
            return self.lora_magnitude / norm
        factors = list(torch.ones_like(norm).chunk(3))
        magnitudes, norms = self.lora_magnitude.chunk(len(self.qkv_slices)), norm.chunk(3)
        for index, magnitude in zip(self.qkv_slices, magnitudes, strict=True):
            factors[index] = magnitude / norms[index]
        return torch.cat(factors)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out,) of the equivalent plain layer."""
        weight, bias = super().merged()
        return weight * self.dora_scale(torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1), bias

    def _add_low_rank(self, x: Tensor, low_rank: Tensor) -> Tensor:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.weight + self.delta_weight(), dim=1)
        output = self.affine(x, None) + F.linear(low_rank, self.factors()[1])
        return output * self.dora_scale(norm) + self.bias


class PiSSALinear(LoRALinear):
    """LoRA whose A and B start at the principal singular part of W (PiSSA, Meng et al. 2024, eqs. 2 to 4).

    y = W_res x + b + s B A dropout(x), where s B_0 A_0 is the best approximation of W of rank r, W_res = W - s B_0 A_0
    is the frozen residual, and B_0, A_0 are the initial values of B and A. The residual is stored as the base's weight
    W and the buffers ``initial_A`` and ``initial_B``, and the layer is computed as W x + b + s [B, -B_0] [A; A_0] x,
    an update of rank 2 r of the unchanged base. Slices of the output are factorized separately.

    Args:
        linear: the layer to adapt; see :class:`LoRALinear`. Factors of a weight on the meta device are not computed.
        args: positional arguments of :class:`LoRALinear`.
        kwargs: keyword arguments of :class:`LoRALinear`.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, linear: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(linear, *args, **kwargs)
        with torch.no_grad():
            if not self.weight.is_meta:
                slices = self.weight.chunk(1 if self.qkv_slices is None else 3)
                parts = [principal_factors(slices[i] / self.scaling, self.rank) for i in self.qkv_slices or [0]]
                self.lora_A.copy_(torch.cat([A for A, _ in parts]))
                self.lora_B.copy_(torch.cat([B for _, B in parts]))
        self.register_buffer("initial_A", self.lora_A.detach().clone())
        self.register_buffer("initial_B", self.lora_B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A_0] (2 n r, in) and [B, -B_0] (out, 2 n r)."""
        A, B = super().factors()
        return torch.cat((A, self.initial_A)), torch.cat((B, -self._zero_padded(self.initial_B)), dim=1)

    def _low_rank(self, x: Tensor) -> Tensor:
        """Compute s A dropout(x) and s A_0 x: (N, in) -> (N, 2 n r)."""
        return torch.cat((super()._low_rank(x), F.linear(x, self.initial_A) * self.scaling), dim=1)


def principal_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation B A of a matrix W of rank r, with its singular values divided equally.

    For W = U S V^T, A = sqrt(S_r) V_r^T and B = U_r sqrt(S_r). The singular vectors are computed as eigenvectors of the
    smaller one of W^T W and W W^T in double precision, which takes less time than a singular value decomposition.

    Args:
        weight: (out, in).
        rank: r, at most the smaller size of ``weight``.

    Returns:
        A (r, in) and B (out, r).
    """
    if weight.size(0) < weight.size(1):
        A, B = principal_factors(weight.T, rank)
        return B.T, A.T
    W = weight.double()
    V = torch.linalg.eigh(W.T @ W).eigenvectors[:, -rank:].flip(1)  # (in, r), by descending singular value
    US = W @ V
    root = torch.linalg.vector_norm(US, dim=0).sqrt()
    tiny = torch.finfo(torch.float32).tiny
    return (root.unsqueeze(1) * V.T).to(weight.dtype), (US / root.clamp_min(tiny)).to(weight.dtype)


class LoRAEmbedding(nn.Embedding):
    """Token embedding W (V, C) with a low-rank update s (B A)^T, in the lookup and in the tied head.

    ``weight`` is the weight of the replaced embedding, under the same name. A (r, V) is initialized by zeros and B
    (C, r) by N(0, 1), as in peft, so that the update is zero at first.

    Args:
        embedding: the embedding to adapt; its weight is reused.
        rank: r.
        scaling: s.
        loraplus_lr_ratio: learning rate of B divided by that of A (LoRA+).
    """

    surgery = "LoRA"

    def __init__(self, embedding: nn.Embedding, rank: int, scaling: float, loraplus_lr_ratio: float = 1.0) -> None:
        nn.Module.__init__(self)  # Embedding.__init__ would create a new weight
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.sparse = None, False  # read by DistributedDataParallel
        self.weight = embedding.weight
        self.rank, self.scaling, self.loraplus_lr_ratio = rank, scaling, loraplus_lr_ratio
        self.lora_A = nn.Parameter(self.weight.new_zeros(rank, self.num_embeddings))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.embedding_dim, rank))
        nn.init.normal_(self.lora_B)

    def merged(self) -> tuple[Tensor, None]:
        """Return W + s (B A)^T, (V, C), the weight of the equivalent plain embedding and head; no bias."""
        return self.weight + self.scaling * (self.lora_B @ self.lora_A).T, None

    def forward(self, input: Tensor) -> Tensor:
        """Look up the adapted embeddings (..., C) of token ids (...)."""
        low = F.embedding(input, self.lora_A.T)  # (..., r)
        return F.embedding(input, self.weight) + F.linear(low * self.scaling, self.lora_B)


Adapter = LoRALinear | LoRAEmbedding


@dataclass
class LoRA(Surgery):
    """Low-rank adapters on linear layers of the blocks and on the token embedding (Hu et al. 2022).

    Args:
        rank: rank r of an adapter, at least 1.
        alpha: the update is scaled by alpha / r; above 0.
        dropout: dropout probability of an adapter's input in training, in [0, 1).
        targets: the layers to adapt: ``q``, ``k``, ``v`` (the slices of c_attn), ``c_attn``, ``c_proj`` (of the
            attention), ``c_fc``, ``mlp.c_proj``, and ``wte``, the token embedding. ``wte`` does not depend on
            ``layers``, has no dropout and does not support DoRA.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).
        use_dora: weight-decomposed adaptation (Liu et al. 2024).
        init: initial values: ``kaiming``, random A and B = 0, or ``pissa``, the principal singular part of the weight
            (Meng et al. 2024), which then trains while the residual is frozen. ``pissa`` supports neither ``wte`` nor
            DoRA, and the rank must not exceed the sizes of the weight.
        layers: the blocks to adapt, as numbers from 0 or as ranges such as ``"0-2,9-11"``; by default all.
        loraplus_lr_ratio: learning rate of B divided by that of A, above 0 (LoRA+, Hayou et al. 2024).

    Raises:
        InputError: a value is out of range; in ``apply``, a target or block does not exist, or a layer has an adapter
            already.
    """

    freezes_base = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["c_attn"])
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["kaiming", "pissa"] = "kaiming"
    layers: Layers = None
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        is_rank, known = isinstance(self.rank, int) and self.rank >= 1, (*TARGETS, "wte")
        require(is_rank, "rank", self.rank, "a whole number of at least 1", "LoRA")
        require(self.alpha > 0, "alpha", self.alpha, "above 0", "LoRA")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)", "LoRA")
        require(self.loraplus_lr_ratio > 0, "loraplus_lr_ratio", self.loraplus_lr_ratio, "above 0", "LoRA")
        are_targets = isinstance(self.targets, list) and all(target in known for target in self.targets)
        require(are_targets and bool(self.targets), "targets", self.targets, f"a list of {', '.join(known)}", "LoRA")
        supports_dora = not self.use_dora or "wte" not in self.targets
        require(supports_dora, "use_dora", self.use_dora, "false with the target wte", "LoRA")
        require(self.init in ("kaiming", "pissa"), "init", self.init, "'kaiming' or 'pissa'", "LoRA")
        supports_pissa = self.init == "kaiming" or not (self.use_dora or "wte" in self.targets)
        require(supports_pissa, "init", self.init, "'kaiming' with use_dora and with the target wte", "LoRA")

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add adapters to the target layers and freeze the published parameters; see :class:`Surgery`."""
        scaling = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        blocks, layers = chosen_blocks(self.layers, len(model.h), "LoRA"), target_layers(self.targets, "LoRA")
        paths = {f"h.{i}.{name}": qkv_slices for i in blocks for name, qkv_slices in layers.items()}
        adapts_wte = "wte" in self.targets
        for path in [*paths, *["wte"] * adapts_wte]:
            plain_layer(model, path, "LoRA")
        limit = model.config.n_embd  # the smaller size of every weight and slice
        fits = self.init == "kaiming" or self.rank <= limit
        require(fits, "rank", self.rank, f"at most n_embd = {limit} with init 'pissa'", "LoRA")
        for path, qkv_slices in paths.items():
            linear: Any = model.get_submodule(path)
            kind = DoRALinear if self.use_dora else PiSSALinear if self.init == "pissa" else LoRALinear
            adapted = kind(linear, self.rank, scaling, self.dropout, qkv_slices, self.loraplus_lr_ratio)
            model.set_submodule(path, adapted.train(linear.training))
        if adapts_wte:
            model.wte = LoRAEmbedding(model.wte, self.rank, scaling, self.loraplus_lr_ratio).train(model.wte.training)
        freeze_base(model)
        return model

    @staticmethod
    def merge(model: GPT2) -> GPT2:
        """Merge every adapter into its layer; see :func:`~gpt2_pl.surgery.base.merge`."""
        return merge(model)

    @staticmethod
    def unmerge(model: GPT2) -> GPT2:
        """Undo :meth:`merge`."""
        return unmerge(model)
