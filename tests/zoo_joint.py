"""The zoo: denoisers whose blocks read text and image in one sequence."""

from zoo import Inputs, Specimen, add, noise, text


def _z_image(batch: int, length: int) -> Inputs:
    """Texts of unequal length, so that there is a mask."""
    return {
        "x": list(noise("image", batch, 4, 1, 8, 8).unbind()),
        "cap_feats": [rows[index:] for index, rows in enumerate(text(batch, length, 12).unbind())],
    }


def _z_image_of_unequal_pictures(batch: int, length: int) -> Inputs:
    inputs = _z_image(batch, length)
    wide = [noise("wide image", 4, 1, 8, 16 * (index + 1)) for index in range(batch)]
    return {**inputs, "x": wide}


_Z_IMAGE = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [4, 4, 4],
    "axes_lens": [128, 32, 32],
}
_PADDED = "text is padded with tokens of its own to multiples of 32"
add(Specimen("z-image", "ZImageTransformer2DModel", _Z_IMAGE, _z_image, text="cap_feats", positioned=_PADDED))
add(
    Specimen(
        "z-image-masked",
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        _z_image_of_unequal_pictures,
        text="cap_feats",
        positioned=_PADDED,
    )
)


def _z_image_omni(batch: int, length: int) -> Inputs:
    """One picture to read and one to draw, each with text."""
    captions = text(batch, length, 12)
    seen, drawn = noise("image", batch, 4, 1, 8, 8), noise("second image", batch, 4, 1, 8, 8)
    return {
        "x": [[a, b] for a, b in zip(seen, drawn, strict=True)],
        "cap_feats": [[rows[:3], rows[3:], noise("end of text", 1, 12)] for rows in captions],
        "siglip_feats": [[noise("siglip", 2, 2, 10), None] for _ in range(batch)],
        "image_noise_mask": [[0, 1] for _ in range(batch)],
    }


add(
    Specimen(
        "z-image-omni",
        "ZImageTransformer2DModel",
        {**_Z_IMAGE, "siglip_feat_dim": 10},
        _z_image_omni,
        text="cap_feats",
        positioned=_PADDED,
    )
)
