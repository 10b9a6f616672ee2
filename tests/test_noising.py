"""Laws of noising: equal to diffusers, invertible, deaf to the rest of the batch."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch.testing import assert_close

from diffusers_softrepa.noising import Noising, sample_timesteps

FLOW = Noising.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
EPSILON = Noising.from_scheduler(DDPMScheduler())
VELOCITY = Noising.from_scheduler(DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"))
EVERY_NOISING = pytest.mark.parametrize("noising", [FLOW, EPSILON, VELOCITY], ids=lambda n: n.prediction)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (FlowMatchEulerDiscreteScheduler(), "flow"),
        (FlowMatchHeunDiscreteScheduler(), "flow"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow"),
        (DDIMScheduler(), "epsilon"),
        (EulerDiscreteScheduler(), "epsilon"),
        (DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v_prediction"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_prediction_is_read_from_the_scheduler(scheduler, prediction):
    assert Noising.from_scheduler(scheduler).prediction == prediction


def test_a_subclass_of_a_flow_matching_scheduler_is_flow_matching():
    class MyScheduler(FlowMatchEulerDiscreteScheduler):
        pass

    assert Noising.from_scheduler(MyScheduler()).prediction == "flow"


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "DDPMScheduler has prediction_type 'sample' and alphas_cumprod"),
        (EDMEulerScheduler(), "EDMEulerScheduler has prediction_type 'epsilon' and no alphas_cumprod"),
        (DDPMScheduler(num_train_timesteps=50), "1000 training timesteps but DDPMScheduler has 50"),
    ],
    ids=["sample", "no table", "50 timesteps"],
)
def test_other_schedulers_are_refused_with_their_reason(scheduler, message):
    with pytest.raises(ValueError, match=message):
        Noising.from_scheduler(scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_discrete_noising_and_targets_equal_diffusers(prediction_type, beta_schedule, pair):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule)
    noising, timestep = Noising.from_scheduler(scheduler), torch.tensor([0, 350, 999])
    velocity = scheduler.get_velocity(*pair, timestep)
    assert_close(noising.noisy_latents(*pair, timestep), scheduler.add_noise(*pair, timestep))
    assert_close(noising.target(*pair, timestep), pair[1] if prediction_type == "epsilon" else velocity)


def test_flow_noising_equals_diffusers(pair):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timestep = scheduler.timesteps[[0, 400, 999]]
    assert_close(FLOW.noisy_latents(*pair, timestep), scheduler.scale_noise(pair[0], timestep, pair[1]))


def test_the_flow_target_is_the_derivative_of_the_noisy_latents_in_sigma(pair):
    step = FLOW.noisy_latents(*pair, torch.tensor([700.0])) - FLOW.noisy_latents(*pair, torch.tensor([200.0]))
    assert_close(step / 0.5, FLOW.target(*pair, torch.tensor([200.0])))


@EVERY_NOISING
def test_noisy_latents_and_target_give_the_clean_latents_back(noising, pair):
    timestep = noising.round_timestep(torch.tensor([20.0, 350.5, 800.0]))
    noisy, target = noising.noisy_latents(*pair, timestep), noising.target(*pair, timestep)
    signal, noise = (
        noising.noisy_latents(torch.ones(3, 1, 1, 1), torch.zeros(1), timestep),
        noising.noisy_latents(torch.zeros(3, 1, 1, 1), torch.ones(1), timestep),
    )
    clean = {
        "flow": noisy - noise * target,
        "epsilon": (noisy - noise * target) / signal,
        "v_prediction": signal * noisy - noise * target,
    }
    assert_close(clean[noising.prediction], pair[0], atol=1e-4, rtol=1e-4)


@EVERY_NOISING
def test_each_row_is_noised_as_if_it_were_alone(noising, pair):
    timestep = noising.round_timestep(torch.tensor([20.0, 350.0, 999.0]))
    for i in range(3):
        row = [tensor[i : i + 1] for tensor in (*pair, timestep)]
        assert_close(noising.noisy_latents(*row)[0], noising.noisy_latents(*pair, timestep)[i])
        assert_close(noising.target(*row)[0], noising.target(*pair, timestep)[i])


@EVERY_NOISING
def test_one_timestep_and_one_noise_serve_the_whole_batch(noising, pair):
    latents, noise, timestep = pair[0], pair[1][:1], noising.round_timestep(torch.tensor([620.0]))
    everything = latents, noise.expand_as(latents), timestep.expand(3)
    for method in (noising.noisy_latents, noising.target):
        assert_close(method(latents, noise, timestep), method(*everything))
        assert_close(method(latents, noise, timestep[0]), method(*everything))


@EVERY_NOISING
def test_packed_half_precision_latents_are_noised_in_float32(noising):
    packed = torch.ones(2, 16, 64, dtype=torch.bfloat16)
    timestep = noising.round_timestep(torch.tensor([1.0, 500.0]))
    for method in (noising.noisy_latents, noising.target):
        assert method(packed, packed, timestep).dtype == torch.float32
        assert method(packed, packed, timestep).shape == packed.shape


def test_float_timesteps_are_refused_where_integers_are_needed(pair):
    with pytest.raises(ValueError, match=r"integer timesteps but got torch.float32; round them with"):
        EPSILON.noisy_latents(*pair, torch.tensor([1.5]))


def test_a_wrong_number_of_timesteps_is_refused(pair):
    with pytest.raises(ValueError, match=r"need one timestep or 3, one per row, but got shape \(2,\)"):
        FLOW.target(*pair, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "shifted"])
def test_sampled_timesteps_stay_in_range_and_repeat_with_the_seed(density):
    first, second = (
        sample_timesteps(10_000, density=density, std=20.0, shift=1e9, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert first.min() >= 0 and first.max() < 1000
    assert torch.equal(first, second)
    assert EPSILON.round_timestep(first).max() == 999 and EPSILON.round_timestep(first).dtype == torch.int64
    assert torch.equal(FLOW.round_timestep(first), first)


def test_rounded_uniform_timesteps_reach_every_integer_equally_often():
    timesteps = EPSILON.round_timestep(sample_timesteps(400_000, generator=torch.Generator().manual_seed(2)))
    counts = torch.bincount(timesteps, minlength=1000)
    assert len(counts) == 1000 and counts.min() > 280 and counts.max() < 520  # 400 +- 6 standard deviations


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_densities_equal_diffusers(density):
    expected = compute_density_for_timestep_sampling(
        density, 64, logit_mean=0.5, logit_std=1.5, generator=torch.Generator().manual_seed(3)
    )
    timesteps = sample_timesteps(64, density=density, mean=0.5, std=1.5, generator=torch.Generator().manual_seed(3))
    assert_close(timesteps, 1000 * expected)


def test_the_shifted_density_is_the_shift_of_the_flow_matching_scheduler():
    uniform, shifted = (
        sample_timesteps(50, density=density, shift=3.0, generator=torch.Generator().manual_seed(4))
        for density in ("uniform", "shifted")
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=(uniform / 1000).tolist())
    assert_close(shifted, scheduler.timesteps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "cosine"}, r"density must be one of \('uniform', 'logit_normal', 'shifted'\) but got 'cosine'"),
        ({"std": 0.0}, "std and shift must be positive but got std=0.0"),
        ({"shift": -1.0}, "but got std=1.0 and shift=-1.0"),
    ],
    ids=["density", "std", "shift"],
)
def test_sampling_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        sample_timesteps(1, **options)
