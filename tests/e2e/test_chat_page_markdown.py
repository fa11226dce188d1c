"""The chat page's Markdown in a real browser: what models write is rendered, what could run is not."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from live_server import live_server

# Render in a page of its own, whole or growing by `step` characters, and say what came of it.
RENDER = """
async ({ text, step }) => {
  const { MarkdownView } = await import('/static/markdown.js');
  const root = document.createElement('div');
  document.body.replaceChildren(root);
  const view = new MarkdownView(root);
  let numMade = 0;
  const createElement = document.createElement;
  const createTextNode = document.createTextNode;
  document.createElement = function (name) { numMade++; return createElement.call(this, name); };
  document.createTextNode = function (text) { numMade++; return createTextNode.call(this, text); };
  for (let end = step; step && end < text.length; end += step) view.render(text.slice(0, end), true);
  view.render(text);
  delete document.createElement;
  delete document.createTextNode;
  const elements = [...root.querySelectorAll('*')];
  let depth = 0;
  for (const element of elements) {
    let own = 0;
    for (let node = element; node !== root; node = node.parentNode) own++;
    depth = Math.max(depth, own);
  }
  return {
    html: root.innerHTML,
    text: root.textContent,
    names: [...new Set(elements.map((element) => element.localName))],
    attributes: [...new Set(elements.flatMap((element) => element.getAttributeNames()))],
    links: elements.filter((element) => element.localName === 'a').map((link) => link.href),
    numNodes: elements.length,
    numMade,
    depth,
  };
}
"""

ALLOWED = {
    "p",
    "h3",
    "h4",
    "h5",
    "h6",
    "em",
    "strong",
    "del",
    "code",
    "pre",
    "figure",
    "figcaption",
    "span",
    "button",
    "ul",
    "ol",
    "li",
    "blockquote",
} | {"hr", "br", "a", "div", "table", "thead", "tbody", "tr", "th", "td"}
ALLOWED_ATTRIBUTES = {"class", "type", "href", "target", "rel", "start"}

DOCUMENT = """# A *title*

First paragraph with **bold**, _emphasis_, `code`, ~~gone~~ and a [link](https://example.org "title").
It has a second line.

- one
- two
  - nested **deep**
  1. numbered

  a paragraph of two
- three

```python
def f():

    return "```"
```

> quoted
> - list

| a | b |
|---|--:|
| 1 | `2` |

3. three
4. four
***
Last words: 2 * 3 * 4, snake_case_name, https://example.org/a_b_c.
"""


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    with live_server() as server:
        page = browser.new_page()
        page.goto(server.url)
        # Whatever a text starts has this window as its victim.
        page.evaluate("() => { window.alert = () => { window.isHacked = true } }")
        yield page
        assert not page.evaluate("window.isHacked")
        page.close()


def render(page: Page, text: str, step: int = 0) -> Any:
    return page.evaluate(RENDER, {"text": text, "step": step})


def code(language: str, text: str) -> str:
    head = f'<span>{language}</span><button type="button" class="copy-code">Copy</button>'
    return f'<figure class="code"><figcaption>{head}</figcaption><pre><code>{text}</code></pre></figure>'


def link(url: str, text: str) -> str:
    return f'<a href="{url}" target="_blank" rel="noopener noreferrer">{text}</a>'


TABLE = '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>'


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("one\n\ntwo", "<p>one</p><p>two</p>"),
        ("one\ntwo", "<p>one\ntwo</p>"),
        ("one  \ntwo\\\nthree", "<p>one<br>two<br>three</p>"),
        ("# a\n## b #\n###### f", "<h3>a</h3><h4>b</h4><h6>f</h6>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("Title\n===\nSub\n---", "<h3>Title</h3><h4>Sub</h4>"),
        ("a **b *c* d** e", "<p>a <strong>b <em>c</em> d</strong> e</p>"),
        ("***both***", "<p><em><strong>both</strong></em></p>"),
        ("__strong__ _em_ snake_case_name", "<p><strong>strong</strong> <em>em</em> snake_case_name</p>"),
        ("2 * 3 * 4 and 5*6", "<p>2 * 3 * 4 and 5*6</p>"),
        ("**not closed", "<p>**not closed</p>"),
        (r"\*plain\* \[x\](y)", "<p>*plain* [x](y)</p>"),
        ("~~gone~~ ~here~", "<p><del>gone</del> ~here~</p>"),
        ("`a*b*` ``x`y`` `open", "<p><code>a*b*</code> <code>x`y</code> `open</p>"),
        ("`<b>`", "<p><code>&lt;b&gt;</code></p>"),
        ("```js\nlet a = `1`;\n\n  b\n```\nafter", code("js", "let a = `1`;\n\n  b") + "<p>after</p>"),
        ("~~~\n```\n~~~", code("text", "```")),
        ("```py\nopen", code("py", "open")),
        ("text\n```\nx\n```", "<p>text</p>" + code("text", "x")),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n   - b\n     - c\n2. d", "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>"),
        ("1. a\n  - b", "<ol><li>a<ul><li>b</li></ul></li></ol>"),
        ("1. a\n   ```\n   x\n   ```\n2. b", f"<ol><li>a{code('text', 'x')}</li><li>b</li></ol>"),
        ("- a\nlazy\n\nout", "<ul><li>a\nlazy</li></ul><p>out</p>"),
        ("- a\n1. b", "<ul><li>a</li></ul><ol><li>b</li></ol>"),
        ("It was\n1984. A year", "<p>It was\n1984. A year</p>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n\n---\n* * *", "<p>a</p><hr><hr>"),
        (
            "Here:\n| a | b | c |\n|:--|:-:|--:|\n| 1 | `x\\|y` | **3** |\n\nend",
            '<p>Here:</p><div class="table"><table><thead><tr><th>a</th><th class="center">b</th>'
            '<th class="right">c</th></tr></thead><tbody><tr><td>1</td><td class="center"><code>x|y</code></td>'
            '<td class="right"><strong>3</strong></td></tr></tbody></table></div><p>end</p>',
        ),
        ("a | b\nno table", "<p>a | b\nno table</p>"),
        ("a|b\r\n-|-\r\n\r\n# c\r\nd<br>e<BR />f <bra>", TABLE + "<h3>c</h3><p>d<br>e<br>f &lt;bra&gt;</p>"),
        ("```make\na:\n\tb\n\t\u3000c\n```", code("make", "a:\n\tb\n\t\u3000c")),
        ("- [ ] a\n- [x] b\n- [y] c", "<ul><li>\u2610 a</li><li>\u2611 b</li><li>[y] c</li></ul>"),
        ("- a\n\t```\n\t\tx\n\t```", f"<ul><li>a{code('text', chr(9) + 'x')}</li></ul>"),
        ("[a *b*](https://x.org/(y) 'title')", f"<p>{link('https://x.org/(y)', 'a <em>b</em>')}</p>"),
        ("[](http://x.org)", f"<p>{link('http://x.org/', 'http://x.org/')}</p>"),
        ("![alt](https://x.org/i.png)", f"<p>{link('https://x.org/i.png', 'alt')}</p>"),
        (
            "<https://x.org> <me@x.org>",
            f"<p>{link('https://x.org/', 'https://x.org')} {link('mailto:me@x.org', 'me@x.org')}</p>",
        ),
        (
            "see https://x.org/a_b_c. (https://y.org)",
            f"<p>see {link('https://x.org/a_b_c', 'https://x.org/a_b_c')}. ({link('https://y.org/', 'https://y.org')})</p>",
        ),
        ("[1] [a] [b](c", "<p>[1] [a] [b](c</p>"),
        ("**中文** ünï *çödé*", "<p><strong>中文</strong> ünï <em>çödé</em></p>"),
        ("", ""),
    ],
)
def test_markdown_becomes(page: Page, markdown: str, html: str) -> None:
    assert render(page, markdown)["html"] == html


@pytest.mark.parametrize(
    ("growing", "html"),
    [
        ("**bold", "<p><strong>bold</strong></p>"),
        ("**bold*", "<p><strong>bold</strong></p>"),
        ("a `co", "<p>a <code>co</code></p>"),
        ("a *", "<p>a </p>"),
        ("- *a*\n- **b", "<ul><li><em>a</em></li><li><strong>b</strong></li></ul>"),
        ("```py\nx =", code("py", "x =")),
        ("| a | b |\n|--", "<p>| a | b |\n|--</p>"),
    ],
)
def test_what_is_still_open_looks_as_if_closed(page: Page, growing: str, html: str) -> None:
    rendered = page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import('/static/markdown.js');
          const root = document.createElement('div');
          new MarkdownView(root).render(text, true);
          return root.innerHTML;
        }""",
        growing,
    )
    assert rendered == html


# In these a line looks like a table's while it grows, and is none in the end.
NEARLY = ["a | b | c\n|-|-|\n|-|-|* d", "- **a\n|-|-|\n|-|-|** b", "a\n\nb | c\n-|-\r\n-|- d"]


@pytest.mark.parametrize("text", [DOCUMENT, DOCUMENT.replace("\n", "\r\n"), *NEARLY])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_text_that_grows_ends_as_if_rendered_whole(page: Page, step: int, text: str) -> None:
    assert render(page, text, step)["html"] == render(page, text)["html"]


def test_what_a_reader_does_in_an_answer_outlives_its_growth(page: Page) -> None:
    """A click, the focus, a selection, and how far code is scrolled."""
    found = page.evaluate(
        r"""async () => {
          const { MarkdownView } = await import('/static/markdown.js');
          const root = document.createElement('div');
          root.className = 'text';
          root.style = 'width: 200px';
          document.body.replaceChildren(root);
          const view = new MarkdownView(root);
          const found = {};
          let text = '```py\nx = "' + 'a'.repeat(400) + '"\n';
          view.render(text, true);
          const [pre, button] = ['pre', 'button'].map((name) => root.querySelector(name));
          pre.scrollLeft = 50;
          button.focus();
          button.dataset.state = 'copied';
          for (const more of ['y', '\n', '```\n\n', 'some **words', ' more']) view.render(text += more, true);
          found.scrollLeft = root.querySelector('pre').scrollLeft;
          found.isFocused = document.activeElement === button && button.isConnected;
          found.state = button.dataset.state;
          const words = root.querySelector('strong').firstChild;
          getSelection().setBaseAndExtent(words, 0, words, 5);
          for (const more of [' and', ' more**', ' and `more']) view.render(text += more, true);
          found.selected = getSelection().toString();
          found.html = root.lastChild.outerHTML;
          return found;
        }"""
    )
    assert found == {
        "scrollLeft": 50,
        "isFocused": True,
        "state": "copied",
        "selected": "words",
        "html": "<p>some <strong>words more and more</strong> and <code>more</code></p>",
    }


def test_a_long_answer_is_not_rendered_again_and_again(page: Page) -> None:
    paragraph = "A **paragraph** of some words, `code` and [a link](https://example.org).\n\n"
    text = paragraph * 700  # 50 kB
    half, whole = (render(page, part, 20) for part in (text[: len(text) // 2], text))
    assert whole["html"] == render(page, text)["html"]
    assert whole["numMade"] < 2.1 * half["numMade"]


SCRIPT = "<script>alert(1)</script>"
HOSTILE = {
    "script": SCRIPT,
    "event handler": "<img src=x onerror=alert(1)> <svg onload=alert(1)><a href='javascript:alert(1)'>x</a>",
    "html in every place": f"# {SCRIPT}\n- {SCRIPT}\n> {SCRIPT}\n\n|{SCRIPT}|b|\n|-|-|\n"
    f"|{SCRIPT}|`{SCRIPT}`|\n\n```{SCRIPT}\n{SCRIPT}\n```",
    "broken out of a link": '[x](https://x.org/"onmouseover="alert(1)) '
    '[y](<https://x.org/"><img src=x onerror=alert(1)>)',
    "language": '```" onclick="alert(1)\nx\n```',
    "comment": "<!-- --><iframe srcdoc='<script>parent.alert(1)</script>'></iframe><style>*{display:none}</style>",
    "null and separators": "\x00 \u2028 \u2029 \u202e [x](java\x00script:alert(1))",
}
LINKS = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    " javascript:alert(1)",
    "java\tscript:alert(1)",
    "\x01javascript:alert(1)",
    "javascript&colon;alert(1)",
    "javascript&#58;alert(1)",
    "&#106;avascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "DATA:text/html;base64,PHNjcmlwdD4=",
    "vbscript:x",
    "file:///etc/passwd",
    "blob:https://x.org/1",
    "//x.org/a",
    "/v1/models",
    "x",
    "view-source:https://x.org",
    "intent://x#Intent;end",
    "about:blank",
    "http://",
    "https://[",
]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_could_run_comes_out(page: Page, text: str) -> None:
    for step in (0, 1):
        result = render(page, text, step)
        assert set(result["names"]) <= ALLOWED
        assert set(result["attributes"]) <= ALLOWED_ATTRIBUTES
        assert all(link.startswith(("http://", "https://", "mailto:")) for link in result["links"])


@pytest.mark.parametrize("url", LINKS, ids=json.dumps)
def test_a_link_that_is_not_to_the_web_is_text(page: Page, url: str) -> None:
    result = render(page, f"[a]({url}) [b](<{url}>) <{url}> ![c]({url})")
    assert result["links"] == []
    assert set(result["names"]) == {"p"}


BIG = {
    "quotes": ">" * 10_000 + " x",
    "quotes on many lines": "\n".join(">" * n + "x" for n in range(1000)),
    "lists": "- " * 10_000 + "x",
    "indented lists": "\n".join("  " * n + "- x" for n in range(2000)),
    "strong": "**a " * 10_000 + "b** " * 10_000,
    "emphasis": "*a _b " * 10_000 + "c_ d*" * 10_000,
    "brackets": "[" * 10_000 + "](https://x.org)" * 10_000,
    "links in links": "[a" * 5000 + "](https://x.org)" * 5000,
    "a megabyte in a word": "a" * 2**20,
    "a megabyte of stars": "*" * 2**20,
    "a megabyte of stars and words": "*a " * (2**20 // 3),
    "a megabyte of closers": "a* " * (2**20 // 3),
    "a megabyte of openers and closers": "*a **a_ " * (2**20 // 8),
    "a megabyte of backticks": "` `` ``` " * (2**20 // 9),
    "a megabyte of brackets": "[a](" * (2**20 // 4),
    "a megabyte of half links": "](" * (2**20 // 2),
    "a megabyte of blanks": "a" + " " * 2**20 + "b",
    "a megabyte of blanks in a link": "[a](" + " " * 2**20 + "x)",
    "a megabyte of pipes": "|" * 2**20 + "\n" + "|-" * 2**19,
    "a megabyte of tables": "|a|\n|-|\n" * (2**20 // 8),
    "a megabyte of hashes": "# " + "#" * 2**20,
    "a megabyte of dashes": "- " * 2**19 + "x",
    "a megabyte of less-than": "<" * 2**20,
    "a megabyte of addresses": "https://a" * (2**20 // 9),
    "a megabyte of lines": "a\n" * 2**19,
    "a megabyte of fences": "```\n" * 2**18,
    "a megabyte of backslashes": "\\" * 2**20,
}


@pytest.mark.parametrize("text", BIG.values(), ids=BIG)
def test_a_huge_or_deep_text_is_bounded_work(page: Page, text: str) -> None:
    """The test's time limit is the watch: what is quadratic in these would take it many minutes."""
    result = render(page, text)
    assert set(result["names"]) <= ALLOWED
    assert result["depth"] <= 60
    assert result["numNodes"] <= len(text)
