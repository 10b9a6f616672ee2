"""The specs against diffusers' own table of what blocks read and return: two descriptions of the same classes."""

import inspect

import pytest

import zoo
from diffusers_softrepa.families import family_of, text_blocks

# Classes whose entry in diffusers' table contradicts the class itself, and what the class says.
_WRONG_IN_DIFFUSERS = {
    "BriaTransformerBlock": "returns the text first and the image second; the table says the image comes first",
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_specs_agree_with_the_table_that_diffusers_keeps_for_its_caches():
    helpers = pytest.importorskip("diffusers.hooks._helpers", reason="diffusers 0.35 brought the table")
    helpers.TransformerBlockRegistry._register()
    table = helpers.TransformerBlockRegistry._registry
    compared, differing = set(), {}
    for specimen in zoo.everything():
        try:
            denoiser = specimen.denoiser()
        except pytest.skip.Exception:
            continue  # a class that this release of diffusers lacks
        for block in text_blocks(denoiser, family_of(denoiser)):
            kind = type(block.module)
            if kind not in table or kind in compared or block.group.returns == "self":
                continue  # joint blocks return one sequence, which the table describes as two
            compared.add(kind)
            entry = table[kind]  # an older table does not name the argument
            name = getattr(entry, "encoder_hidden_states_argument_name", block.group.text)
            theirs = (name, entry.return_encoder_hidden_states_index)
            if theirs[0] not in inspect.signature(kind.forward).parameters:
                theirs = (block.group.text, theirs[1])  # the table has its default name where the class has another
            if theirs != (block.group.text, block.group.returns):
                differing[kind.__name__] = (theirs, (block.group.text, block.group.returns))
    assert len(compared) >= 8
    assert set(differing) <= set(_WRONG_IN_DIFFUSERS), differing
