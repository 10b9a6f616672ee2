"""The Space draws without and with soft tokens from the same noise, answers mistakes with sentences, works offline.

What draws (`examples/space/studio.py`) is tested here. The page runs in an environment of its own, because gradio
needs an older pillow than the rest is tested with: the interpreter in SOFTREPA_SPACE_PYTHON, or `.venv/space`, or this
one if it has gradio. With SOFTREPA_REQUIRE_BROWSER=1 the browser's test must run; SOFTREPA_SPACE_SCREENSHOT says
where its image of the page goes.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import SpaceCard
from PIL import Image

import tiny
from diffusers_softrepa import SoftREPAConfig

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
PIPELINE, ADAPTER = "shapes_world/sd3", "shapes_world/adapter"
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # that the Hub knows
PATIENCE = 180  # seconds that a machine busy with something else may take for two images


def pinned(name: str, file: str = "constraints.txt") -> str:
    return re.search(rf"^{name}==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def space() -> ModuleType:
    spec = importlib.util.spec_from_file_location("studio", SPACE / "studio.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["studio"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def studio(space: ModuleType) -> Any:
    """The embedded pipeline and adapter, found from any folder."""
    made = space.Studio()
    made.prepare(PIPELINE, ADAPTER)
    return made


def order(space: ModuleType, prompt: str = "a red circle", **settings: Any) -> Any:
    return space.Order(prompt, **({"seed": 3, "guidance_scale": 3.0, "steps": 3, "pipeline": PIPELINE} | settings))


def test_at_weight_zero_the_image_is_the_bases_bit_for_bit(space: ModuleType, studio: Any):
    wanted = order(space)
    with_adapter = studio.draw(wanted, ADAPTER, 1.0)
    base = studio.draw(wanted)
    assert studio.draw(wanted, ADAPTER, 0.0).tobytes() == base.tobytes()
    assert with_adapter.tobytes() != base.tobytes()
    assert space.Studio().draw(wanted).tobytes() == base.tobytes()  # where no adapter ever was


@pytest.mark.parametrize("make", [tiny.sd15_pipeline, tiny.sdxl_pipeline, tiny.sd3_pipeline])
def test_any_pipeline_and_adapter_in_folders_will_do(space: ModuleType, tmp_path: Path, make: Callable[[], Any]):
    pipe = make()
    denoiser = pipe.components.get("transformer") or pipe.components["unet"]
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(denoiser, init_std=0.5))
    pipe.save_softrepa(tmp_path / "adapter")
    pipe.unload_softrepa()
    pipe.save_pretrained(tmp_path / "pipeline")
    wanted = order(space, steps=2, pipeline=str(tmp_path / "pipeline"))
    fresh, steps = space.Studio(), []
    base = fresh.draw(wanted, on_step=lambda done, of: steps.append((done, of)))
    assert steps == [(1, 2), (2, 2)]
    assert fresh.draw(wanted, str(tmp_path / "adapter"), 0.0).tobytes() == base.tobytes()
    assert fresh.draw(wanted, str(tmp_path / "adapter"), 1.0).tobytes() != base.tobytes()


def test_no_image_is_drawn_twice(space: ModuleType, studio: Any):
    wanted, steps = order(space, seed=4), []
    for adapter, weight in ((None, 0.0), (ADAPTER, 1.0), (None, 0.0), (ADAPTER, 0.5), (ADAPTER, 1)):
        studio.draw(wanted, adapter, weight, lambda done, of: steps.append((done, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)] * 3
    assert studio.knows(wanted) and studio.knows(wanted, ADAPTER, 0.5)
    assert not studio.knows(wanted, ADAPTER, 0.25)


def test_only_the_last_images_are_kept(space: ModuleType):
    few = space.Studio(kept=2)
    orders = [order(space, seed=seed, steps=1) for seed in range(3)]
    for wanted in orders:
        few.draw(wanted)
    assert [few.knows(wanted) for wanted in orders] == [False, True, True]


def test_threads_that_ask_at_once_get_what_they_get_alone(space: ModuleType, studio: Any):
    wishes = [(order(space, seed=seed), adapter, 0.5) for seed in range(3) for adapter in (None, ADAPTER)]
    alone = [space.Studio().draw(*wish).tobytes() for wish in wishes[:2]]
    alone += [studio.draw(*wish).tobytes() for wish in wishes[2:]]
    fresh = space.Studio()
    with ThreadPoolExecutor(6) as pool:
        together = [image.tobytes() for image in pool.map(lambda wish: fresh.draw(*wish), wishes)]
    assert together == alone


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": "  "}, "The prompt is empty; write what should be drawn."),
        ({"prompt": None}, "The prompt is empty; write what should be drawn."),
        ({"pipeline": ""}, "The pipeline is empty; give a folder or a Hub id."),
        ({"prompt": "a" * 301}, "The prompt has 301 characters, but at most 300 are allowed."),
        ({"seed": None}, "The seed must be a whole number from 0 to 4294967295, but is missing."),
        ({"seed": -1}, "The seed must be a whole number from 0 to 4294967295, but is -1."),
        ({"steps": 0}, "The number of steps must be a whole number from 1 to 100, but is 0."),
        ({"steps": 2.5}, "The number of steps must be a whole number from 1 to 100, but is 2.5."),
        ({"guidance_scale": float("nan")}, "The guidance scale must be a number from 0 to 20, but is nan."),
        ({"guidance_scale": "3"}, "The guidance scale must be a number from 0 to 20, but is '3'."),
    ],
)
def test_a_wrong_wish_is_answered_with_a_sentence(space: ModuleType, settings: dict[str, Any], sentence: str):
    with pytest.raises(space.CannotDraw, match=f"^{re.escape(sentence)}$"):
        order(space, **settings)


@pytest.mark.parametrize(
    ("count", "steps", "sentence"),
    [
        (2, 3, "The number of images must be one of 1, 4, 9, but is 2."),
        (None, 3, "The number of images must be one of 1, 4, 9, but is missing."),
        (10**9, 3, "The number of images must be one of 1, 4, 9, but is 1000000000."),
        (
            9,
            50,
            "9 images of 50 steps take 450 steps, but at most 400 are allowed at once; choose fewer images or steps.",
        ),
    ],
)
def test_too_many_images_are_answered_with_a_sentence(space: ModuleType, count: Any, steps: int, sentence: str):
    with pytest.raises(space.CannotDraw, match=f"^{re.escape(sentence)}$"):
        order(space, steps=steps).series(count)


def test_a_series_has_the_seeds_that_follow_and_goes_on_at_zero_after_the_last(space: ModuleType):
    assert order(space).series(1) == [order(space)]
    assert [each.seed for each in order(space, seed=7).series(4)] == [7, 8, 9, 10]
    assert [each.seed for each in order(space, seed=2**32 - 2).series(4)] == [2**32 - 2, 2**32 - 1, 0, 1]


def test_the_oracle_reads_the_images_of_its_world_and_of_no_other(space: ModuleType):
    from shapes_world.world import Thing, render

    images = [render([Thing("red", shape, 16, 16, 4.5)]) for shape in ("circle", "square")]
    assert space.read_by_oracle(order(space, "A  red circle"), images) == [True, False]
    assert space.read_by_oracle(order(space, "drawing of a square"), images) == [False, True]
    assert space.read_by_oracle(order(space, "two red circles"), images) == [False, False]
    for unknown in ("a dog", "five circles", "four circles and four squares"):
        assert space.read_by_oracle(order(space, unknown), images) is None
    assert space.read_by_oracle(order(space, "a red circle", pipeline="user/sd3"), images) is None


def test_a_sheet_frames_each_image_as_it_was_read_and_changes_no_pixel(space: ModuleType):
    images = [Image.effect_noise((32, 32), 90 + place).convert("RGB") for place in range(4)]
    framed = space.sheet(images, [True, False, False, True])
    side = 32 * 6 + 3 * space.FRAME  # six times as large, in a frame, and the gap to the next one
    assert framed.size == (2 * side - space.FRAME,) * 2
    for place, image in enumerate(images):
        left, top = place % 2 * side, place // 2 * side
        assert framed.getpixel((left, top)) == (space.RIGHT if place in (0, 3) else space.WRONG)
        inner = framed.crop((left + 4, top + 4, left + 4 + 192, top + 4 + 192))
        assert inner.resize((32, 32), Image.Resampling.NEAREST).tobytes() == image.tobytes()
    assert space.sheet(images[:1]).tobytes() == space.enlarged(images[0]).tobytes()
    assert space.sheet([Image.new("RGB", (1024, 768))] * 4).size == (2052, 1540)


def test_what_a_caption_says_is_read_back(space: ModuleType):
    from shapes_world.world import ask_of, prompts

    for ask in prompts(30, seed=0):
        for said in (ask, ask.exactly()):
            read = ask_of(said.caption)
            assert (read.skill, read.wants, read.relation, read.caption) == (
                said.skill, said.wants, said.relation, said.caption,
            )  # fmt: skip
    for unknown in (
        "",
        "there is",
        "a dog",
        "a circle left of a square left of a cross",
        "two circles left of a cross",
    ):
        assert ask_of(unknown) is None


@pytest.mark.parametrize(
    ("adapter", "weight", "sentence"),
    [
        ("", 1.0, "The adapter is empty; give a folder or a Hub id."),
        ("nowhere", 1.0, "There is no adapter 'nowhere': it is not a folder here, and Hub ids look like user/name."),
        ("shapes_world/sd3", 1.0, "The adapter 'shapes_world/sd3' cannot be loaded: there is no adapter_model."),
        (ADAPTER, 1.5, "The weight must be a number from 0 to 1, but is 1.5."),
        (ADAPTER, None, "The weight must be a number from 0 to 1, but is missing."),
    ],
)
def test_a_wrong_adapter_is_answered_with_a_sentence_and_the_next_image_is_right(
    space: ModuleType, studio: Any, adapter: str, weight: Any, sentence: str
):
    wanted = order(space, seed=5)
    before = studio.draw(wanted, ADAPTER, 0.75).tobytes()
    with pytest.raises(space.CannotDraw, match=re.escape(sentence)):
        studio.draw(wanted, adapter, weight)
    studio._images.clear()
    assert studio.draw(wanted, ADAPTER, 0.75).tobytes() == before


def test_a_wrong_pipeline_is_answered_with_a_sentence(space: ModuleType, tmp_path: Path):
    fresh = space.Studio()
    with pytest.raises(space.CannotDraw, match="There is no pipeline 'nowhere': it is not a folder here"):
        fresh.prepare("nowhere")
    with pytest.raises(space.CannotDraw, match=r"cannot be loaded: Error no file named model_index\.json"):
        fresh.prepare(str(tmp_path))
    unet = UNet2DModel(8, 3, 3, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(space.CannotDraw, match="DDPMPipeline has no denoiser that takes soft tokens; docs/families"):
        fresh.draw(order(space, pipeline=str(tmp_path)))
    assert fresh.draw(order(space)).size == (32, 32)


def test_what_a_pipeline_says_while_it_draws_comes_out_as_a_sentence(
    space: ModuleType, studio: Any, monkeypatch: pytest.MonkeyPatch
):
    pipe = studio.prepare(PIPELINE, ADAPTER)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nin three places")

    monkeypatch.setattr(pipe, "encode_prompt", fail)
    with pytest.raises(space.CannotDraw, match=r"^StableDiffusion3Pipeline could not draw this: out of memory$"):
        studio.draw(order(space, seed=6), ADAPTER, 1.0)
    monkeypatch.undo()
    assert studio.draw(order(space, seed=6), ADAPTER, 1.0).size == (32, 32)


def test_small_images_are_enlarged_by_whole_pixels_and_others_keep_their_size(space: ModuleType):
    small = Image.effect_noise((32, 24), 90).convert("RGB")
    large = space.enlarged(small)
    assert large.size == (384, 288)
    assert large.resize(small.size, Image.Resampling.NEAREST).tobytes() == small.tobytes()
    assert {colour for _, colour in large.getcolors()} == {colour for _, colour in small.getcolors()}
    assert space.enlarged(large) is not None and space.enlarged(large).size == large.size
    assert space.enlarged(Image.new("RGB", (1024, 768))).size == (1024, 768)


def test_the_difference_is_the_share_of_pixels_that_are_not_equal(space: ModuleType):
    one = Image.new("RGB", (10, 10))
    other = one.copy()
    other.putpixel((2, 3), (0, 1, 0))
    other.putpixel((4, 3), (9, 0, 3))
    assert space.difference(one, one) == 0
    assert space.difference(one, other) == pytest.approx(0.02)


def test_a_text_length_is_given_only_where_the_tokenizers_take_less_than_the_pipeline_asks(
    space: ModuleType, studio: Any, monkeypatch: pytest.MonkeyPatch
):
    pipe = studio.prepare(PIPELINE)
    assert space._text_length(pipe) == max(
        json.loads((ROOT / "examples/shapes_world/sd3" / name / "tokenizer_config.json").read_text())[
            "model_max_length"
        ]
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
    )
    monkeypatch.setattr(pipe.tokenizer_3, "model_max_length", 512)  # as Stable Diffusion 3's own
    assert space._text_length(pipe) is None


def test_the_card_of_the_space_says_what_the_hub_needs():
    card = SpaceCard.load(SPACE / "README.md")
    data = card.data.to_dict()
    assert data["sdk"] == "gradio"
    assert data["sdk_version"] == pinned("gradio")
    assert (SPACE / data["app_file"]).is_file()
    assert {data["colorFrom"], data["colorTo"]} <= COLORS
    assert data["title"] and data["emoji"] and len(data["short_description"]) <= 60
    assert data["license"] == "apache-2.0"
    assert data["python_version"] in ("3.10", "3.11", "3.12", "3.13")


def test_the_requirements_of_the_space_are_the_extra():
    assert "diffusers-softrepa[space]" in (SPACE / "requirements.txt").read_text()
    lowest = re.search(r'^space = \["gradio>=([\d.]+),<7"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert lowest == pinned("gradio", "constraints-lowest.txt")


def test_ci_runs_the_browser():
    assert 'export SOFTREPA_REQUIRE_BROWSER="${SOFTREPA_REQUIRE_BROWSER:-1}"' in (ROOT / ".ci" / "run").read_text()
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["space"]["env"]["SOFTREPA_REQUIRE_BROWSER"] == "1"


# The page


def missing(what: str) -> None:
    """Skips the test, or fails where the browser must run."""
    if os.environ.get("SOFTREPA_REQUIRE_BROWSER") == "1":
        pytest.fail(f"SOFTREPA_REQUIRE_BROWSER is 1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has gradio."""
    own = ROOT / ".venv" / "space" / "bin" / "python"
    chosen = os.environ.get("SOFTREPA_SPACE_PYTHON") or (str(own) if own.is_file() else sys.executable)
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('gradio') is None)"
    if subprocess.run([chosen, "-c", look], check=False).returncode != 0:
        missing("no environment here has gradio; examples/space/README.md says how to make one")
    return chosen


@pytest.fixture
def address(python: str, tmp_path: Path) -> Iterator[str]:
    """The address of the running page; its process reaches no network but the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SOFTREPA_SPACE_", "GRADIO_"))
    }
    command = [python, str(SPACE / "app.py"), "--port", str(port), "--host", "127.0.0.1"]
    log = tmp_path / "app.log"
    with log.open("w") as out:
        app = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment
            | offline
            | nowhere
            | {"no_proxy": "127.0.0.1,localhost", "GRADIO_TEMP_DIR": str(tmp_path)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: app.poll() is not None or answers(f"http://127.0.0.1:{port}/config"), "the page answers")
        assert app.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


def answers(url: str) -> bool:
    try:
        return fetch(url) != b""
    except OSError:
        return False


def fetch(url: str) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=30) as answer:
        return answer.read()


def until(happened: Callable[[], Any], what: str) -> Any:
    """Returns what `happened` returns as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.1)
    pytest.fail(f"{PATIENCE} seconds passed and it did not happen that {what}")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium that can reach the loopback only and logs what it asks for."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None or shutil.which("chromedriver") is None:
        missing("there is no Chromium with its driver here; on Debian: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium comes with the extra dev")

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1000,1340",
        "hide-scrollbars", "no-proxy-server", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_window_size(1000, 1340)
        yield driver
    finally:
        driver.quit()


def test_visitors_of_a_fixed_page_can_name_no_other_model_and_an_unknown_one_is_refused_at_the_start(python: str):
    code = """
import inspect, json, sys
sys.path.insert(0, sys.argv[1])
import app
names = {}
for fixed in (False, True):
    page = app.make_page(app.Studio(), app.EMBEDDED, app.ADAPTER, fixed=fixed)
    endpoints = page.get_api_info()["named_endpoints"]
    names[fixed] = {name: [p["parameter_name"] for p in found["parameters"]] for name, found in endpoints.items()}
print(json.dumps(names))
app.main(["--pipeline", "nowhere"])
"""
    done = subprocess.run([python, "-c", code, str(SPACE)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("There is no pipeline 'nowhere'"), done.stderr
    assert "Traceback" not in done.stderr
    drawing = ["prompt", "seed", "images", "guidance_scale", "steps", "weight"]
    names = json.loads(done.stdout)
    assert names["true"] == {"/draw": drawing}
    assert names["false"] == {"/draw": [*drawing, "pipeline", "adapter"]}


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def _one(self, selector: str) -> Any:
        return until(lambda: self.driver.find_elements("css selector", selector), f"{selector} is there")[0]

    def source(self, name: str) -> str:
        """The address of the image that is shown as `base` or `adapter`, or nothing."""
        script = "return document.querySelector(arguments[0])?.src || ''"
        return self.driver.execute_script(script, f"#{name} img")

    def status(self) -> str:
        script = "return document.querySelector('#status')?.innerText.trim() || ''"
        return self.driver.execute_script(script)

    def write(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self._one(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def press(self, selector: str, *keys: str) -> None:
        self._one(selector).send_keys(*keys)

    def click(self, selector: str) -> None:
        self._one(selector).click()

    def verdict(self, name: str) -> str:
        """What is said below the images of `base` or `adapter`."""
        script = "return document.querySelector(arguments[0])?.innerText.trim() || ''"
        return self.driver.execute_script(script, f"#{name}_verdict")

    def toast(self) -> str:
        script = "return [...document.querySelectorAll('.toast-body')].map(toast => toast.innerText).join()"
        return until(lambda: self.driver.execute_script(script), "an error is shown")

    def foreign_requests(self) -> list[str]:
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        assert urls
        return [url for url in urls if re.match(r"(http|ws)s?://(?!127\.0\.0\.1[:/])", url)]


def test_a_visitor_draws_moves_the_weight_and_makes_a_mistake(browser: Any, address: str, tmp_path: Path):
    from selenium.webdriver.common.keys import Keys

    assert json.loads(fetch(f"{address}/config"))["analytics_enabled"] is False
    page = Page(browser)
    browser.get(address)
    until(lambda: page.status().startswith("Weight 1:"), "the page draws its first prompt by itself")
    first = page.source("base")

    opening = [right_of(page.verdict(name)) for name in ("base", "adapter")]
    assert opening[0] < opening[1]  # it opens on something that the adapter mends
    time.sleep(1)  # until the veil of drawing has faded from the images
    chosen = Path(os.environ.get("SOFTREPA_SPACE_SCREENSHOT") or tmp_path / "space.png")
    chosen.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(chosen))

    page.write("#prompt textarea, #prompt input", "two blue squares and a red circle")
    page.click("#draw")
    until(lambda: page.source("base") not in ("", first), "the base's images are there")
    status = until(lambda: page.source("adapter") and page.status(), "all images are there")
    assert re.fullmatch(r"Weight 1: drawn in \d+\.\d s\.", status)
    base, tuned = page.source("base"), page.source("adapter")
    assert fetch(base) != fetch(tuned)

    page.press("#weight input[type=range]", Keys.HOME)
    until(lambda: page.source("adapter") not in ("", tuned), "the adapter's image changes")
    status = until(lambda: page.status().startswith("Weight 0:") and page.status(), "the weight is 0")
    assert "not one pixel differs; drawn in" in status
    assert page.source("base") == base
    assert fetch(page.source("adapter")) == fetch(base)
    assert page.verdict("adapter") == page.verdict("base")

    page.press("#weight input[type=range]", *[Keys.ARROW_RIGHT] * 3)  # faster than it is drawn
    until(lambda: page.status().startswith("Weight 0.15:"), "the last weight is drawn")
    assert page.source("base") == base

    page.write("#prompt textarea, #prompt input", "a dog")
    page.click("#draw")
    until(
        lambda: page.verdict("adapter").startswith("This prompt cannot be checked"),
        "the page says that it cannot check",
    )
    base = page.source("base")

    page.write("#prompt textarea, #prompt input", "")
    page.click("#draw")
    assert "The prompt is empty; write what should be drawn." in page.toast()
    assert page.source("base") == base  # what was there stays
    assert page.foreign_requests() == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def right_of(verdict: str) -> int:
    """How many of four images are right."""
    return int(re.fullmatch(r"(\d) of 4 right", verdict)[1])


def test_who_comes_to_a_full_queue_reads_it_in_a_sentence(address: str):
    config = json.loads(fetch(f"{address}/config"))
    draw = next(each for each in config["dependencies"] if each["api_name"] == "draw")
    answers = []
    for seed in range(40):  # faster than any machine draws nine images of forty steps
        wish = ["a red circle", seed, 9, 2.0, 40, 1.0, PIPELINE, ADAPTER]
        body = {"data": wish, "fn_index": draw["id"], "session_hash": f"visitor{seed}"}
        answers.append(post(f"{address}/gradio_api/queue/join", body))
    refused = [answer for status, answer in answers if status != 200]
    assert {status for status, _ in answers} == {200, 429}
    sentence = "The queue is full: 16 requests are waiting. Please try again in a minute."
    assert refused == [{"detail": sentence}] * len(refused)
    assert answers[15][0] == 200


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with direct.open(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
