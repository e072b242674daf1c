"""The page in a real browser: what people see, type and click."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from PIL import Image

from hf_forward_inf import Attribution
from tests.helpers.browser import LOWEST_CONTRAST, Tab, chromium

NATS = {"units": "loss", "reduction": "sum", "measure": "rise", "radius": 2.0}
SYSTEM = "You are a helper of a bicycle shop, and you answer in two sentences."
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    '<a href="javascript:window.hacked = 3">click</a></div></li></ol></details>{{ 7 * 7 }}'
    "<style>body { display: none }</style>"
)
browser = pytest.fixture(scope="module")(chromium)


def conversation(question, answer):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return [*messages, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Three queries over 300 conversations: two rows stand out for the first, nothing for the last two."""
    answer = "Clean the rim with alcohol and sand the pads."
    rows = [
        conversation("My brake squeals", answer),
        conversation("My brake squeals!", answer),
        conversation("The brake is loud", "Salt on the rim: wash it off."),
    ] + [conversation(f"What is {word(i)}?", f"It is {word(i + 7)} {HOSTILE}.") for i in range(297)]
    candidates = Dataset.from_dict(
        {
            "messages": rows,
            "source": ["forum"] * 3 + ["faq"] * 297,
            "=note": ["=1+1"] * 300,
            "id": [f"t{i}" for i in range(300)],
        }
    )
    asked = [
        ("Why does my brake squeal?", answer),
        ("What colour is Mars?", "Red."),
        ("And zebras?", f"Striped {HOSTILE}"),
    ]
    queries = Dataset.from_dict({"messages": [conversation(*one) for one in asked]})
    scores = np.random.default_rng(0).normal(scale=0.01, size=(3, 300)).astype(np.float32)
    scores[0, :3] = [41, 38, 0.5]
    terms = [
        "<|im_start|>",
        "assistant",
        "\n",
        "Clean",
        " the",
        " rim",
        " with",
        " alcohol",
        " and",
        " sand",
        " the",
        " pads",
        ".",
    ]
    shares = [0.0, 0.0, 0.0, 2.0, 0.1, 9.0, 0.1, 10.0, 0.1, 5.0, 0.1, 4.0, 0.1]
    details = Dataset.from_list([{"query": 0, "candidate": 0, "terms": terms, "term_scores": shares}])
    found = Attribution(scores, queries, candidates, config=NATS, details=details)
    other = Attribution(-scores, queries, candidates, method="bm25")
    path = tmp_path_factory.mktemp("chats") / "page.html"
    found.to_html(path, compare=[other], remarks=["Without them, it says nothing.", "", ""], about={"model": "tiny"})
    return path


def word(i):
    return "".join(chr(97 + int(digit)) * 2 for digit in f"{i:03}")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Sixty queries in FTRACE's layout."""
    names = [word(i) for i in range(400)]
    rows = {
        "inputs_pretokenized": [f"{name} is ruled from <extra_id_0>." for name in names],
        "targets_pretokenized": [f"<extra_id_0> {name}ville" for name in names],
    }
    candidates = Dataset.from_dict(rows)
    scores = np.random.default_rng(0).normal(scale=0.01, size=(60, 400)).astype(np.float32)
    scores[np.arange(30), np.arange(30)] = 20
    path = tmp_path_factory.mktemp("facts") / "page.html"
    found = Attribution(scores, candidates.select(range(60)), candidates, config=NATS)
    found.to_html(path, proponents=[[i] for i in range(60)])
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two labelled pictures over 150, with labels, predictions and a heatmap."""
    images = [Image.new("RGB", (80, 60), (i, 255 - i, 90)) for i in range(150)]
    rows = {
        "image": images,
        "label": [i % 2 for i in range(150)],
        "prediction": ["fox"] * 150,
        "probability": [0.75] * 150,
    }
    candidates = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["cat", "dog"]))
    scores = np.random.default_rng(0).normal(size=(2, 150)).astype(np.float32)
    scores[:, 5] = 9
    details = [
        {"query": 0, "candidate": 5, "terms": ["0,0", "0,1", "1,0", "1,1"], "term_scores": [0.0, 1.0, 0.0, 0.2]}
    ]
    path = tmp_path_factory.mktemp("pictures") / "page.html"
    found = Attribution(scores, candidates.select([1, 5]), candidates, config=NATS)
    replace(found, details=Dataset.from_list(details)).to_html(path)
    return path


def test_rows_come_in_their_order_with_scores_levels_and_places(browser, chats):
    tab = Tab(browser, chats)
    first = ".query >> nth=0 >> .by-0 .row"
    assert tab.texts(f"{first} > .head > .rank")[:3] == ["1", "3", "4"]  # the second is stacked below the first
    assert tab.texts(f"{first} > .head > .score")[:2] == ["41", "0.5"]
    assert tab.texts(f"{first} > .head > .level")[:2] == ["●● strong", "○○ none"]
    assert tab.texts(f"{first} > .head > .where")[0] == "row 0 · t0 · forum"
    assert tab.count(first, visible=False) + tab.count(f"{first} >> .copy", visible=False) == 10
    verdict = tab.texts(".query >> nth=0 >> .by-0 .verdict")[0]
    assert verdict == (
        "2 of 300 training rows stand out, strongly. 2 of them say “Clean the rim with alcohol and sand the pads.”; "
        "all come from forum."
    )
    assert "Nothing in this data stands out" in tab.texts(".query >> nth=1 >> .by-0 .verdict")[0]
    assert tab.texts(".remark") == ["Without them, it says nothing."]


def test_near_duplicates_are_stacked(browser, chats):
    tab = Tab(browser, chats)
    assert tab.texts(".query >> nth=0 >> .by-0 .copies") == ["×2"]
    assert tab.count(".query >> nth=0 >> .by-0 .copy") == 0
    tab.page.get_by_text("1 more row says nearly the same").click()
    assert tab.count(".query >> nth=0 >> .by-0 .copy") == 1


def test_conversations_are_bubbles_with_the_repeated_system_prompt_folded(browser, chats):
    tab = Tab(browser, chats)
    assert tab.texts(".query >> nth=0 >> .by-0 .row >> nth=0 >> .role") == ["user", "assistant"]
    assert tab.count(f"text={SYSTEM}") == 0
    prompt = tab.page.locator(".query >> nth=0 >> .by-0 .row .system > summary").first
    assert "the same in" in prompt.inner_text()
    prompt.click()
    assert tab.count(f"text={SYSTEM}") == 1
    assert "<|im_" not in tab.page.locator("body").inner_text()


def test_the_answer_is_large_tokens_are_marked_by_more_than_colour_and_shared_words_underlined(browser, chats):
    tab = Tab(browser, chats)
    assert tab.texts(".query >> nth=0 >> h2 mark") == ["Clean the rim with alcohol and sand the pads."]
    assert float(tab.style("details[open] h2", "fontSize")[:-2]) > 20
    assert tab.texts(".query >> nth=0 >> h2 u") == ["Clean", "rim", "alcohol", "sand", "pads"]
    assert tab.texts(".query >> nth=1 >> h2 u") == []  # no row stands out
    row = ".query >> nth=0 >> .by-0 .row >> nth=0"
    assert tab.texts(f"{row} >> .h4") == ["rim", "alcohol"] and tab.texts(f"{row} >> .h3") == ["sand"]
    assert int(tab.style(f"{row} >> .h4", "fontWeight")) >= 700
    assert tab.page.locator(f"{row} >> .h4").first.get_attribute("title") == "+9"
    assert tab.texts(f"{row} >> .turn.user u") == ["brake"]
    assert "underline" in tab.style(f"{row} >> .turn.user u", "textDecorationLine")


def test_the_strip_says_in_words_where_the_best_are(browser, chats):
    tab = Tab(browser, chats)
    strip = tab.page.locator(".query >> nth=0 >> .by-0 .strip")
    assert "the best is 41" in strip.locator("svg").get_attribute("aria-label")
    assert strip.locator("i.strong").count() == 2 and strip.locator("i").count() == 10
    assert strip.locator("i.strong").last.bounding_box()["x"] > strip.locator("i.none").last.bounding_box()["x"] + 300


def test_nothing_from_the_data_becomes_markup_or_script_and_nothing_is_requested(browser, chats):
    tab = Tab(browser, chats)
    tab.page.get_by_role("button", name="Open all").click()
    assert tab.page.evaluate("window.hacked") is None
    assert tab.count("script", visible=False) == 1 and tab.count("img, iframe, object, embed", visible=False) == 0
    links = tab.page.locator("a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    assert tab.page.evaluate(
        "[...document.querySelectorAll('*')].every(o => [...o.attributes].every(a => !a.name.startsWith('on')))"
    )
    assert "<script>window.hacked = 1</script>" in tab.page.locator("main").inner_text()
    assert "{{ 7 * 7 }}" in tab.page.locator("main").inner_text()
    assert tab.requests == [chats.as_uri()] and tab.complaints == []


def test_even_a_script_that_got_onto_the_page_does_not_run(browser, tmp_path):
    rows = Dataset.from_dict({"text": ["a"]})
    plot = "<svg><script>window.hacked = 1</script></svg><img src='https://x.org/x.png' onerror='window.hacked = 2'>"
    Attribution(np.ones((1, 1), np.float32), rows, rows).to_html(tmp_path / "page.html", plot=plot)
    tab = Tab(browser, tmp_path / "page.html")
    assert tab.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in one for one in tab.complaints)


def test_the_switch_shows_what_another_attributor_found(browser, chats):
    tab = Tab(browser, chats)
    best = ".query >> nth=0 >> .row >> visible=true"
    assert "row 0" in tab.texts(f"{best} >> nth=0 >> .where")[0]
    tab.page.get_by_label("bm25").check()
    assert "row 0" not in tab.texts(f"{best} >> nth=0 >> .where")[0]
    assert tab.count(".by-0") == 0 and tab.count(".by-1") > 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["chats", "facts", "pictures"])
def test_every_text_has_contrast_and_nothing_is_wider_than_the_screen(browser, request, kind, dark):
    tab = Tab(browser, request.getfixturevalue(kind), dark=dark)
    contrast, where = tab.page.evaluate(LOWEST_CONTRAST)
    assert contrast >= 4.5, where
    for width in (1400, 390):
        tab.page.set_viewport_size({"width": width, "height": 900})
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    shade = sum(map(int, tab.style(".hfi", "backgroundColor")[4:-1].split(",")[:3]))
    assert (shade < 150) == dark
    assert tab.complaints == []


def test_sixty_queries_are_folded_and_short_on_a_phone(browser, facts):
    tab = Tab(browser, facts, width=390)
    assert tab.count(".query") == 60 and tab.count(".query > details[open]") == 1
    assert tab.page.evaluate("document.documentElement.scrollHeight") < 8000  # 86,640 before queries were folded
    assert tab.texts(".query >> nth=1 >> h2") == [f"{word(1)} is ruled from {word(1)}ville."]
    assert "<extra_id" not in tab.page.content().replace("&lt;", "<")
    assert tab.texts(".query >> nth=0 >> h2 mark") == [f"{word(0)}ville"]
    assert tab.texts(".query >> nth=0 >> .proponent") == ["proponent"]


def test_words_and_levels_choose_among_the_queries(browser, facts):
    tab = Tab(browser, facts)
    tab.page.get_by_label("Search").fill(f"{word(40)}ville")
    assert 1 <= tab.count(".query") < 20 and tab.texts(".count")[0].endswith("of 60")
    tab.page.get_by_label("Search").fill("no such word")
    assert tab.count(".query") == 0 and tab.texts(".count") == ["0 of 60"]
    tab.page.get_by_label("Search").fill("")
    tab.page.get_by_label("Show").select_option("strong some")
    assert tab.count(".query") == 30 and tab.texts(".query >> visible=true >> .number")[-1] == "30"
    tab.page.get_by_label("Show").select_option("none unknown")
    assert tab.count(".query") == 30 and tab.texts(".query >> visible=true >> .number")[0] == "31"


def test_all_is_reached_by_keyboard(browser, facts):
    tab = Tab(browser, facts)
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    tab.page.keyboard.press("/")
    assert tab.page.evaluate("document.activeElement.className") == "search"
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("j")
    tab.page.keyboard.press("j")
    assert tab.page.evaluate("document.activeElement.closest('.query').dataset.query") == "2"
    tab.page.keyboard.press("Enter")
    assert tab.count(".query >> nth=1 >> .row") == 10
    tab.page.keyboard.press("k")
    assert tab.page.evaluate("document.activeElement.closest('.query').dataset.query") == "1"
    assert tab.style("summary:focus-visible", "outlineStyle") == "solid"


def test_the_index_and_a_link_lead_to_a_query_and_open_it(browser, facts):
    tab = Tab(browser, facts)
    tab.page.get_by_text("All 60 queries").click()
    assert tab.count(".index li") == 60
    tab.page.locator(".index a >> nth=41").click()
    tab.page.wait_for_function("document.querySelectorAll('.query')[41].firstElementChild.open")
    assert tab.count(".query >> nth=41 >> .row") == 10
    linked = Tab(browser, facts, anchor="#q50")
    assert linked.count(".query >> nth=49 >> .row") == 10
    linked.page.wait_for_function("scrollY > 500")


def test_rows_are_downloaded_as_a_table_that_no_spreadsheet_runs(browser, chats):
    tab = Tab(browser, chats)
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download rows").first.click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 11)]
    assert rows[0]["row"] == "0" and rows[0]["level"] == "strong" and rows[0]["query"] == "1"
    assert rows[0]["text"] == "My brake squeals\nClean the rim with alcohol and sand the pads."
    assert rows[1]["row"] == "1" and "My brake squeals!" in rows[1]["text"]
    tab.page.get_by_role("button", name="Copy link").first.click()
    tab.page.wait_for_function("/Copied|address bar/.test(document.querySelector('.link').textContent)")


def test_it_works_without_scripts(browser, chats, facts):
    tab = Tab(browser, chats, scripts=False)
    assert tab.count(".controls") == 0 and tab.count(".query >> nth=0 >> .row") > 5
    tab.page.get_by_label("bm25").check()
    assert tab.count(".by-0") == 0
    folded = Tab(browser, facts, scripts=False)
    folded.page.locator(".query >> nth=2 >> summary >> nth=0").click()
    assert folded.count(".query >> nth=2 >> .row") == 10
    linked = Tab(browser, facts, scripts=False, anchor="#q9")
    assert linked.count(".query >> nth=8 >> .row") == 10  # what is linked to unfolds by itself


def test_pictures_are_stored_once_described_and_shown_with_labels_and_heat(browser, pictures):
    tab = Tab(browser, pictures)
    names = tab.page.locator("use").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    assert len(names) > len(set(names)) == tab.count(".album image", visible=False)
    assert all(tab.page.locator("[role=img]").evaluate_all("all => all.map(one => !!one.getAttribute('aria-label'))"))
    box = tab.page.locator(".row .picture").first.bounding_box()
    assert box["width"] > 80 and abs(box["width"] / box["height"] - 80 / 60) < 0.05
    assert tab.texts(".query >> nth=0 >> .asked .tag") == ["label dog", "the model says fox (75%)"]
    assert tab.texts(".query >> nth=0 >> .row >> nth=0 >> .tag") == ["label dog", "the model says fox (75%)"]
    hot = tab.page.locator(".query >> nth=0 >> .row >> nth=0 >> .spot")
    assert hot.count() == 1 and (hot.get_attribute("cx"), hot.get_attribute("cy")) == ("60.0", "15.0")
    assert "made the model choose this label" in tab.texts("h1")[0]
    columns = tab.page.locator(".query >> nth=0 >> .row").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().y)"
    )
    assert len(set(columns[:3])) == 1  # a grid
    assert tab.requests == [pictures.as_uri()]


def test_a_card_in_a_notebook_is_styled_and_runs_no_script(browser, tmp_path):
    rows = Dataset.from_dict({"text": [f"{word(i)} {HOSTILE[:34]} {word(i + 3)}" for i in range(120)]})
    scores = np.random.default_rng(0).normal(size=(4, 120)).astype(np.float32)
    card = Attribution(scores, rows.select(range(4)), rows)._repr_html_()
    assert "<script" not in card
    (tmp_path / "cell.html").write_text(f"<!doctype html><body><p>A cell</p>{card}</body>")
    tab = Tab(browser, tmp_path / "cell.html")
    assert tab.count(".row") == 5 and tab.count(".query") == 3
    assert "… and 1 more query" in tab.texts(".hfi > p")[0]
    assert tab.page.evaluate("window.hacked") is None and tab.complaints == []
