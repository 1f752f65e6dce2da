"""The TinyViT family: four stages, MBConv blocks first, then attention in windows; parameter names
of the official checkpoints.

Between modules a map is [B, C, H, W] in channels-last memory, so that blocks see it as [B, H, W, C]
without a copy.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.update import frozen_statistics

__all__ = [
    "TinyViT",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "tiny_vit_21m_224",
    "tiny_vit_21m_384",
    "tiny_vit_21m_512",
]

SMALLEST_IMAGE = 32  # pixels a side: the last stage's map is then a single point

VARIANTS: dict[str, dict[str, Any]] = {
    "5m": {"embed_dims": (64, 128, 160, 320), "num_heads": (2, 4, 5, 10), "drop_path_rate": 0.0},
    "11m": {"embed_dims": (64, 128, 256, 448), "num_heads": (2, 4, 8, 14), "drop_path_rate": 0.1},
    "21m": {"embed_dims": (96, 192, 384, 576), "num_heads": (3, 6, 12, 18), "drop_path_rate": 0.2},
}
VARIANTS["21m_384"] = VARIANTS["21m"] | {
    "drop_path_rate": 0.1,
    "img_size": 384,
    "window_sizes": (12, 12, 24, 12),
}
VARIANTS["21m_512"] = VARIANTS["21m"] | {
    "drop_path_rate": 0.1,
    "img_size": 512,
    "window_sizes": (16, 16, 32, 16),
}
WEIGHTS = ("22kto1k_distill", "22k_distill", "1k")  # names of official checkpoints
WEIGHT_ALIASES = {"in1k": "22kto1k_distill", "in22k": "22k_distill"}


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # of 2.7


def gelu(x: Tensor) -> Tensor:
    """GELU of a map in channels-last memory, seen as the contiguous tensor it is: on a CPU nearly
    twice as fast.
    """
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gelu(nn.Module):
    """`gelu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class ConvBn(nn.Sequential):
    """A convolution without bias, then batch norm; after `fuse` a convolution with bias alone."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bn_weight: float = 1.0,
    ):
        super().__init__()
        self.c = nn.Conv2d(
            in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_chans)
        nn.init.constant_(self.bn.weight, bn_weight)
        # other weights are in both layouts at once, and keep the strides that gradients come in
        if kernel > 1 and in_chans > groups:
            self.c.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm's running statistics and affine part into the convolution."""
        if isinstance(self.bn, nn.Identity):
            return
        bn = self.bn
        kernel = self.c.weight
        exact = torch.promote_types(kernel.dtype, torch.float32)
        scale = bn.weight.to(exact) / torch.sqrt(bn.running_var.to(exact) + bn.eps)
        self.c.bias = nn.Parameter((bn.bias - bn.running_mean * scale).to(kernel.dtype))
        kernel.copy_(kernel * scale[:, None, None, None])
        self.bn = nn.Identity()


class PatchEmbed(nn.Module):
    """Two convolutions of stride 2: [B, in_chans, H, W] -> [B, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.seq = nn.Sequential(
            ConvBn(in_chans, dim // 2, 3, stride=2), Gelu(), ConvBn(dim // 2, dim, 3, stride=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.seq(images.contiguous(memory_format=torch.channels_last))


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 up, 3x3 depthwise, 1x1 down; the residual sum has a GELU too."""

    def __init__(self, dim: int, expand_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(dim * expand_ratio)
        self.conv1 = ConvBn(dim, hidden)
        self.conv2 = ConvBn(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBn(hidden, dim, bn_weight=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))
        return gelu(x + self.drop_path(y))


class PatchMerging(nn.Module):
    """Changes the channels of the map between two stages and divides its sides by the stride."""

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.conv1 = ConvBn(dim, out_dim)
        self.conv2 = ConvBn(out_dim, out_dim, 3, stride, groups=out_dim)
        self.conv3 = ConvBn(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


def window_offsets(window: int, device: torch.device) -> Tensor:
    """For every two points of a window, flattened to [N * N], N = window^2, the column of their
    |dy|, |dx| in `attention_biases`.

    Offsets are numbered in the order first met scanning points row by row, and the first point
    alone meets them all.
    """
    side = torch.arange(window, device=device)
    distance = (side[:, None] - side).abs()
    return (distance[:, None, :, None] * window + distance[:, None, :]).flatten()


class Attention(nn.Module):
    """Pre-norm attention among the points of a window, with a learned bias per head and offset:
    [windows, N, C] -> the same.
    """

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        windows, points, dim = x.shape
        # a head's query, key and value lie together: [windows, heads, N, 3 * C / heads]
        qkv = self.qkv(self.norm(x)).view(windows, points, self.num_heads, -1).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        # Spread anew each time: a kept copy would go stale, and would hold N^2 values per head.
        # Cast after the spreading: its backward sums thousands of values, in the type it is given.
        # Cast at all: cuDNN misreads a float32 mask beside bfloat16 queries. It is not asked while
        # the biases train; with frozen ones under trained queries its gradients may be NaN on an
        # H100 (windows of 24), and `torch.backends.cuda.enable_cudnn_sdp(False)` is the way out.
        biases = self.attention_biases.index_select(1, offsets).to(query.dtype)
        bias = biases.view(1, self.num_heads, points, points)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
        if _is_exporting():  # what it is decomposed into has other strides: no view in the program
            x = x.clone(memory_format=torch.contiguous_format)
        return self.proj(x.reshape(windows, points, dim))


class Mlp(nn.Module):
    """Pre-norm two-layer perceptron on the last dimension."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm(x))))))


class Block(nn.Module):
    """Attention in windows, a depthwise convolution, an MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        local_conv_size: int,
    ):
        super().__init__()
        self.window = window
        self.attn = Attention(dim, num_heads, window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.local_conv = ConvBn(dim, dim, local_conv_size, groups=dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self._attend(x, offsets))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mlp(x))
        return x.permute(0, 3, 1, 2)

    def _attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        """[B, H, W, C] -> the same; a map that is no multiple of the window is padded with zeros,
        which are attended to as well.
        """
        batch, height, width, dim = x.shape
        window = self.window
        rows = -(-height // window)
        columns = -(-width // window)
        below = rows * window - height
        right = columns * window - width
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        x = x.reshape(batch, rows, window, columns, window, dim).transpose(2, 3)
        x = self.attn(x.reshape(-1, window * window, dim), offsets)
        x = x.view(batch, rows, columns, window, window, dim).transpose(2, 3)
        x = x.reshape(batch, rows * window, columns * window, dim)
        return x[:, :height, :width]


class Stage(nn.Module):
    """Blocks at one resolution; `downsample`, the merging that leads to the next stage, is called
    by the model.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module,
        window: int | None,
        use_checkpoint: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window = window  # None: the blocks are convolutions
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        shared = () if self.window is None else (window_offsets(self.window, x.device),)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, *shared, use_reentrant=False, **_recompute_options(block))
            else:
                x = block(x, *shared)
        return x


def _recompute_options(block: nn.Module) -> dict[str, Callable]:
    """A recomputed forward pass must not count its batch twice in the running statistics (a
    compiled one never does).
    """
    if torch.compiler.is_compiling():
        return {}
    return {"context_fn": lambda: (nullcontext(), frozen_statistics(block))}


class TinyViT(nn.Module):
    """TinyViT for images of any size from 32 pixels up; `img_size` only says for which one `flops`
    counts.

    The first stage is convolutional: the first of `num_heads` and of `window_sizes` is not used.
    With `last_stride` 1 the last stage keeps the size of the map before it, as MobileSAM's does.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 576),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 18),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        last_stride: int = 2,
    ):
        super().__init__()
        _check_stages(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, window_sizes=window_sizes
        )
        _check_least(SMALLEST_IMAGE, img_size=img_size)
        _check_least(1, in_chans=in_chans)
        _check_least(0, num_classes=num_classes)
        _check_probabilities(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride {last_stride}: 1 or 2")
        if local_conv_size % 2 == 0:
            raise ValueError(
                f"local_conv_size {local_conv_size}: an odd number keeps the size of the map"
            )
        self.img_size = img_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.depths = tuple(depths)
        self.embed_dims = tuple(embed_dims)
        self.num_features = embed_dims[-1]

        last_block = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last_block for i in range(sum(depths))])
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0])
        self.layers = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []  # what timm's users ask of the maps
        reduction = 4
        for stage, dim in enumerate(embed_dims):
            window = window_sizes[stage] if stage > 0 else None
            blocks: list[nn.Module] = []
            for _ in range(depths[stage]):
                if window is None:
                    block = MBConv(dim, mbconv_expand_ratio, next(rates))
                else:
                    heads = num_heads[stage]
                    rate = next(rates)
                    block = Block(dim, heads, window, mlp_ratio, drop_rate, rate, local_conv_size)
                blocks.append(block)
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"layers.{stage}"}
            )
            downsample: nn.Module = nn.Identity()
            if stage + 1 < len(embed_dims):
                stride = last_stride if stage + 2 == len(embed_dims) else 2
                downsample = PatchMerging(dim, embed_dims[stage + 1], stride)
                reduction *= stride
            self.layers.append(Stage(blocks, downsample, window, use_checkpoint))
        self.norm_head = nn.LayerNorm(self.num_features)
        self.head = _head(self.num_features, num_classes)
        self.apply(_init_linear)

    @classmethod
    def from_config(
        cls, variant: str, pretrained: bool | str | Path = False, **overrides: Any
    ) -> "TinyViT":
        """Build a variant by name (5m, 11m, 21m, 21m_384, 21m_512), with official weights if asked.

        `pretrained` is True (22kto1k_distill), a name of WEIGHTS, or one of kornia's: in1k, in22k,
        and for 21m in1k_384, in1k_512; or a checkpoint's path or link, whose classes are the
        model's unless `num_classes` says otherwise.
        """
        if variant not in VARIANTS:
            raise ValueError(f"no TinyViT variant {variant!r}: there are {', '.join(VARIANTS)}")
        settings = {**VARIANTS[variant], **overrides}
        if not pretrained:
            return cls(**settings)
        from models.pretrained import head_classes, load_pretrained, load_weights, read_state_dict

        if re.fullmatch(r"\w+", str(pretrained)):
            img_size = settings.get("img_size", 224)
            source, which = pretrained_source(variant, pretrained, img_size)
            model = cls(**settings)
            load_pretrained(model, source, which)
            return model
        weights = read_state_dict(pretrained)
        model = cls(**settings)
        if "num_classes" not in overrides:
            model.reset_classifier(head_classes(model, weights))
        load_weights(model, weights, label=str(pretrained))
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path, **overrides: Any) -> "TinyViT":
        """The model of a Hugging Face repository, "user/repository[@revision]", of a folder that
        save_pretrained wrote, or of any checkpoint; in eval mode.
        """
        from models.hub import load_tiny_vit

        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name))
        if is_repository and not Path(name).exists():
            name = f"hf-hub:{name}"
        return load_tiny_vit(name, **overrides)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a folder for from_pretrained, timm and the Hub; options as of
        models.hub.save_pretrained.
        """
        from models.hub import save_pretrained

        save_pretrained(self, folder, **options)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> logits [B, num_classes], or normalised features [B, C] if there
        are no classes.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last stage's map, before pooling: [B, C, H / 32, W / 32]."""
        return self.forward_intermediates(images, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` -> logits, or with `pre_logits` the normalised mean over
        its points, [B, C].
        """
        x = self.norm_head(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map and a list of the maps of the stages in `indices` (None: all, n: the last
        n), or this list alone: [B, C, H / s, W / s], before merging, as `feature_info` tells.

        `norm` changes nothing: no norm is for maps. With `stop_early` the stages above are not run.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: maps are NCHW")
        self._check_images(images)
        taken, last = feature_take_indices(len(self.layers), indices)
        x = self.patch_embed(images)
        maps = []
        for stage, layer in enumerate(self.layers):
            x = layer(x)
            if stage in taken:
                maps.append(x)
            if stage == last and (stop_early or intermediates_only):
                break
            x = layer.downsample(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages above those in `indices`, and with them, or as asked, the norm and the
        head; return the indices, counted from the first stage.
        """
        taken, last = feature_take_indices(len(self.layers), indices)
        is_cut = last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        self.num_features = self.embed_dims[last]
        if is_cut or prune_head:
            self.reset_classifier(0)
        if is_cut or prune_norm:
            self.norm_head = nn.Identity()
        return taken

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            shape = f"[batch, {self.in_chans}, height, width]"
            raise ValueError(
                f"images of shape {list(images.shape)}: this model takes {shape}; in_chans=..."
                " builds it for other channels"
            )
        if images.shape[2] < SMALLEST_IMAGE or images.shape[3] < SMALLEST_IMAGE:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels: {SMALLEST_IMAGE} a side"
                " is the least, resize them"
            )

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one; 0 classes leave the features."""
        _check_least(0, num_classes=num_classes)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.head = _head(self.num_features, num_classes).to(weight.device, weight.dtype)
        self.head.apply(_init_linear)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass, or stop doing so."""
        for layer in self.layers:
            layer.use_checkpoint = enable

    def fuse(self) -> "TinyViT":
        """Fold every batch norm into its convolution, in place, for inference: the outputs are
        those of eval mode.
        """
        for module in self.modules():
            if isinstance(module, ConvBn):
                module.fuse()
        return self

    def flops(self) -> int:
        """Multiply-accumulates of one image of `img_size` pixels a side."""
        return count_multiply_adds(self, self.img_size, self.in_chans)

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters, beside biases and norms, that weight decay should leave
        alone.
        """
        return {"attention_biases"}

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    def layer_depths(self) -> dict[str, int]:
        """For each parameter the block it goes with: mergings with the block before, the stem with
        the first, the head with the last.
        """
        first = (0, *accumulate(self.depths))

        def depth(name: str) -> int:
            match name.split("."):
                case ["patch_embed", *_]:
                    return 0
                case ["layers", stage, "blocks", block, *_]:
                    return first[int(stage)] + int(block)
                case ["layers", stage, "downsample", *_]:
                    return first[int(stage) + 1] - 1
                case _:
                    return self.num_layers - 1

        return {name: depth(name) for name, _ in self.named_parameters()}

    def lr_scales(self, decay: float) -> dict[str, float]:
        """For each parameter the factor of its learning rate: `decay` to the power of the blocks
        above its own.
        """
        return {
            name: decay ** (self.num_layers - depth - 1)
            for name, depth in self.layer_depths().items()
        }


def count_multiply_adds(model: nn.Module, image_size: int, in_chans: int = 3) -> int:
    """Multiply-accumulates of one image of so many pixels a side, counted without computing any."""
    image = torch.empty(1, in_chans, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deepcopy(model).to("meta").eval()(image)
    return counter.get_total_flops() // 2


def pretrained_source(variant: str, pretrained: bool | str, img_size: int) -> tuple[str, str]:
    """The variant whose official checkpoint is meant, and the checkpoint's name among WEIGHTS."""
    if variant == "21m" and pretrained is True and img_size >= 384:
        return ("21m_512" if img_size >= 512 else "21m_384"), WEIGHTS[0]
    if variant.startswith("21m") and pretrained in ("in1k_384", "in1k_512"):
        return f"21m{pretrained.removeprefix('in1k')}", WEIGHTS[0]
    name = WEIGHTS[0] if pretrained is True else WEIGHT_ALIASES.get(pretrained, pretrained)
    if name not in WEIGHTS:
        names = [*WEIGHTS, *WEIGHT_ALIASES]
        if variant.startswith("21m"):
            names += ["in1k_384", "in1k_512"]
        raise ValueError(
            f"no pretrained weights {pretrained!r} for TinyViT {variant}: there are"
            f" {', '.join(names)}; True means the first, and a file's path has a dot or a slash"
        )
    return variant, name


def _head(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _check_stages(**stages: Sequence[int]) -> None:
    """One value per stage and setting, all positive, and heads that share the channels."""
    if len({len(values) for values in stages.values()}) > 1:
        counts = ", ".join(f"{name} has {len(values)}" for name, values in stages.items())
        raise ValueError(f"each stage needs one value of each: {counts}")
    for name, values in stages.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} {list(values)}: each stage's is 1 or more")
    dims = stages["embed_dims"]
    for stage, (dim, heads) in enumerate(zip(dims, stages["num_heads"])):
        if stage > 0 and dim % heads:
            raise ValueError(
                f"num_heads {heads} of stage {stage} does not divide its embed_dims {dim}"
            )
    if dims[0] % 2:
        raise ValueError(f"embed_dims {dims[0]} of stage 0 is odd: the patch embedding halves it")


def _check_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} {value}: {least} is the least")


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value}: a probability in [0, 1)")


# timm reads what data its models take under this name
default_cfgs = {
    "tinyvit_5m_224": {},
    "tinyvit_11m_224": {},
    "tinyvit_21m_224": {},
    "tinyvit_21m_384": {"input_size": (3, 384, 384), "crop_pct": 1.0},
    "tinyvit_21m_512": {"input_size": (3, 512, 512), "crop_pct": 1.0},
}


def _builders(
    variant: str, name: str, cost: str
) -> tuple[Callable[..., TinyViT], Callable[..., TinyViT]]:
    """Two functions that build a variant: tiny_vit_<name>, and tinyvit_<name> for timm, which has
    models of the first name.
    """

    def build(
        pretrained: bool | str | Path = False, num_classes: int | None = None, **overrides: Any
    ) -> TinyViT:
        if num_classes is not None:
            overrides["num_classes"] = num_classes
        return TinyViT.from_config(variant, pretrained, **overrides)

    def entry(pretrained: bool | str | Path = False, **options: Any) -> nn.Module:
        options.setdefault("num_classes", None)  # else timm says 1000
        features = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3)}
        make = partial(build, pretrained)
        return build_model_with_cfg(make, entry.__name__, False, feature_cfg=features, **options)

    for function, prefix in ((build, "tiny_vit"), (entry, "tinyvit")):
        function.__name__ = function.__qualname__ = f"{prefix}_{name}"
        function.__doc__ = f"TinyViT-{variant.upper()}: {cost} multiply-accumulates."
    return build, register_model(entry)


tiny_vit_5m_224, tinyvit_5m_224 = _builders("5m", "5m_224", "5.4 M parameters, 1.3 G")
tiny_vit_11m_224, tinyvit_11m_224 = _builders("11m", "11m_224", "11 M parameters, 2.0 G")
tiny_vit_21m_224, tinyvit_21m_224 = _builders("21m", "21m_224", "21 M parameters, 4.3 G")
tiny_vit_21m_384, tinyvit_21m_384 = _builders("21m_384", "21m_384", "21 M parameters, 13.7 G")
tiny_vit_21m_512, tinyvit_21m_512 = _builders("21m_512", "21m_512", "21 M parameters, 26.9 G")
