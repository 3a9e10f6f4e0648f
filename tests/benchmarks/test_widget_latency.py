"""How long after a key press the memory bar's new picture is on screen: `make bench`.

Measured in the page: from the key's own time stamp to the start of the frame after the one in which the picture
changed. Two frames of waiting (some 33 ms at 60 Hz, 23 on average) are therefore part of every figure.
"""

import statistics

CHANGES = 30
WATCH = """selector => {
    const log = window.latencies = [];
    const picture = () => document.querySelector(selector)?.outerHTML;
    let seen = picture(), pressed = null;
    addEventListener('keydown', event => { pressed = event.timeStamp }, true);
    const frame = () => {
        const now = picture();
        if (now && now !== seen) {
            const since = pressed;
            seen = now;
            requestAnimationFrame(() => log.push(performance.now() - since));
        }
        requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
}"""


def test_slider_to_paint(open_notebook):
    notebook = open_notebook("00_start_here.ipynb").run_all()
    notebook.page.locator(".memory-bar svg[role=img]").wait_for()
    notebook.slider("context").focus()
    notebook.press("Home")
    notebook.page.wait_for_timeout(1000)
    notebook.page.evaluate(WATCH, ".memory-bar svg[role=img]")
    key = "ArrowRight"
    for change in range(1, CHANGES + 1):
        notebook.press(key)
        notebook.page.wait_for_function("n => window.latencies.length >= n", arg=change, timeout=5000)
        if change % 5 == 0:  # to and fro, so that the slider never stands at its end
            key = "ArrowLeft" if key == "ArrowRight" else "ArrowRight"
    times = sorted(notebook.page.evaluate("() => window.latencies"))
    print(f"\nmemory_bar, key to paint over {len(times)} changes: median {statistics.median(times):.0f} ms, "
          f"fastest {times[0]:.0f} ms, slowest {times[-1]:.0f} ms")  # fmt: skip
    assert len(times) == CHANGES
