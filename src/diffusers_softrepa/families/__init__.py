"""Denoiser families: one declarative `FamilySpec` per family, found by the class of the denoiser.

To support another denoiser class, write a `FamilySpec` and pass it to `register_family`. Nothing else has to change.
"""

from torch import nn

from .cross_attention import COSMOS, HUNYUAN_DIT, KANDINSKY5, LUMINA_NEXT, PIXART, PRX, SANA
from .dual_stream import (
    AURA_FLOW,
    COGVIEW3_PLUS,
    COGVIEW4,
    GLM_IMAGE,
    HIDREAM,
    HUNYUAN_IMAGE,
    JOY_IMAGE_EDIT,
    JOY_IMAGE_EDIT_PLUS,
)
from .flux import BRIA, CHROMA, FIBO, FLUX, FLUX2, FLUX3, LONGCAT_IMAGE, OVIS_IMAGE
from .packed import COSMOS3, MINIMAX_H3
from .qwen import NUCLEUS_IMAGE, QWEN_IMAGE, QWEN_IMAGE_21
from .sd3 import SD3
from .single_stream import ERNIE_IMAGE, FIBO2, IDEOGRAM4, KREA2, LUMINA2, OMNIGEN, Z_IMAGE
from .spec import Block, BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, text_blocks
from .unet import DREAMLITE, KANDINSKY3, UNET
from .video_cross import ALLEGRO, ANIMATE_DIFF, I2VGEN_XL, KANDINSKY6, LATTE, LTX, LTX2, SANA_VIDEO, UNET3D
from .video_dual import (
    COGVIDEOX,
    CONSIS_ID,
    EASY_ANIMATE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
    MOCHI,
    MOTIF_VIDEO,
)
from .video_wan import (
    ANYFLOW,
    ANYFLOW_FAR,
    CHRONO_EDIT,
    HELIOS,
    SKYREELS_V2,
    WAN,
    WAN_ANIMATE,
    WAN_ANIMATE2,
    WAN_VACE,
)

_UNETS = (UNET, KANDINSKY3, DREAMLITE)
_FLUXES = (FLUX, FLUX2, FLUX3, CHROMA, OVIS_IMAGE, LONGCAT_IMAGE, BRIA, FIBO)
_QWENS = (QWEN_IMAGE, QWEN_IMAGE_21, NUCLEUS_IMAGE)
_DUAL_STREAM = (
    SD3,
    AURA_FLOW,
    COGVIEW3_PLUS,
    COGVIEW4,
    GLM_IMAGE,
    HUNYUAN_IMAGE,
    HIDREAM,
    JOY_IMAGE_EDIT,
    JOY_IMAGE_EDIT_PLUS,
)
_SINGLE_STREAM = (Z_IMAGE, KREA2, LUMINA2, OMNIGEN, IDEOGRAM4, ERNIE_IMAGE, FIBO2)
_CROSS_ATTENTION = (SANA, PIXART, LUMINA_NEXT, HUNYUAN_DIT, PRX, KANDINSKY5, COSMOS)
_VIDEO_WAN = (WAN, WAN_VACE, WAN_ANIMATE, WAN_ANIMATE2, CHRONO_EDIT, SKYREELS_V2, ANYFLOW, ANYFLOW_FAR, HELIOS)
_VIDEO_CROSS = (LTX, LTX2, ALLEGRO, LATTE, SANA_VIDEO, KANDINSKY6, ANIMATE_DIFF, UNET3D, I2VGEN_XL)
_VIDEO_DUAL = (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_FRAMEPACK,
    HUNYUAN_VIDEO_15,
    COGVIDEOX,
    CONSIS_ID,
    EASY_ANIMATE,
    MOCHI,
    MOTIF_VIDEO,
)
_IMAGES = (*_UNETS, *_FLUXES, *_QWENS, *_DUAL_STREAM, *_SINGLE_STREAM, *_CROSS_ATTENTION)
_PACKED = (COSMOS3, MINIMAX_H3)
_BUILT_IN = (*_IMAGES, *_PACKED, *_VIDEO_WAN, *_VIDEO_CROSS, *_VIDEO_DUAL)
_FAMILIES: dict[str, FamilySpec] = {spec.denoiser: spec for spec in _BUILT_IN}


def register_family(spec: FamilySpec) -> None:
    """Registers a spec, so that denoisers of its class take soft tokens.

    Args:
        spec: Description of the denoiser class. Registering an equal spec again does nothing.

    Raises:
        ValueError: The class or the family name is registered already with a different spec.
    """
    for other in _FAMILIES.values():
        if other != spec and (other.denoiser == spec.denoiser or other.name == spec.name):
            raise ValueError(
                f"a family must be new, but {spec.name!r} for {spec.denoiser} collides with the registered "
                f"{other.name!r} for {other.denoiser}; choose another name, or use the registered spec"
            )
    _FAMILIES[spec.denoiser] = spec


def built_in_families() -> tuple[FamilySpec, ...]:
    """Returns the specs that are part of this package, without those added by `register_family`."""
    return _BUILT_IN


def supported_denoisers() -> list[str]:
    """Returns the names of the denoiser classes that take soft tokens, sorted. Subclasses of them do as well."""
    return sorted(_FAMILIES)


def is_supported(denoiser: nn.Module) -> bool:
    """Returns whether a spec is registered for the class of a denoiser or for one of its base classes.

    Args:
        denoiser: Any module.
    """
    return any(cls.__name__ in _FAMILIES for cls in type(denoiser).__mro__)


def family_of(denoiser: nn.Module) -> FamilySpec:
    """Returns the spec that is registered for the class of a denoiser, or else for its nearest base class.

    Args:
        denoiser: The frozen model, such as `pipe.transformer` or `pipe.unet`.

    Raises:
        ValueError: No spec is registered for the class. The message lists the supported classes.
    """
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    raise ValueError(
        f"soft tokens need a family spec for {type(denoiser).__name__}, and none is registered; supported are "
        f"{', '.join(supported_denoisers())}; describe the class with a FamilySpec and call register_family"
    )


__all__ = [
    "Block",
    "BlockGroup",
    "ExtendedArgument",
    "FamilySpec",
    "TimestepArgument",
    "built_in_families",
    "family_of",
    "is_supported",
    "register_family",
    "supported_denoisers",
    "text_blocks",
]
