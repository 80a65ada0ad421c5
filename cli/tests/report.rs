//! `--report`: one page of a run that holds what `--json` prints, loads nothing, and works in a browser.

#[path = "report/browser.rs"]
mod browser;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use browser::{Browser, wait_for};

/// More than a page may have.
const MOST_BYTES: usize = 3_000_000;

/// A document with everything that a page can show, invented, with texts that would like to be HTML.
const FULL: &str = include_str!("report/full.json");

fn run(arguments: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A folder of one test, empty at first.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The JSON in a page, as it stands there.
fn embedded(page: &str) -> &str {
    let (_, after) = page.split_once(r#"<script type="application/json" id="document">"#).unwrap();
    after.split_once("</script>").unwrap().0
}

const COMMANDS: [&[&str]; 4] = [
    &["compare", "--tokens", "300", "--capacity-factor", "1,1.5", "--router", "top-k,top-k-arrival,phase"],
    &["tune", "--tokens", "200", "--cache-bonus", "0,0.1", "--cached-experts", "8,16"],
    &["replay", "--tokens", "100", "--cached-experts", "16", "--cache-bonus", "0.2"],
    &["generate", "--prompt", "</script><b>And it came to pass", "--new-tokens", "12", "--router", "phase"],
];

/// The page of a command, and what it printed with `--json`.
fn reported(command: &[&str], folder: &Path) -> (PathBuf, Value) {
    let path = folder.join(format!("{}.html", command[0]));
    let output = run(&[command, &["--json", "--report", path.to_str().unwrap()]].concat());
    (path, serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_page_holds_what_json_prints_and_loads_nothing() {
    let folder = folder("json");
    for command in COMMANDS {
        let (path, printed) = reported(command, &folder);
        let page = std::fs::read_to_string(path).unwrap();
        let document: Value = serde_json::from_str(embedded(&page)).unwrap();
        assert_eq!(document["result"], printed, "{command:?}");
        assert_eq!(document["command"], command[0]);
        let line = document["run"]["command_line"].as_str().unwrap();
        assert!(line.starts_with(&format!("phase-moe {} ", command[0])) && line.contains("--report"), "{line}");
        assert!(page.len() < MOST_BYTES, "{} bytes", page.len());
        // What the document says is no part of the page's own markup: nothing in it loads, nothing ends its script.
        let frame = page.replace(embedded(&page), "");
        for outside in ["src=", "href=\"", "url(", "@import", "<link", "<iframe", "<b>"] {
            assert!(!frame.contains(outside), "{command:?}: {outside}");
        }
        assert_eq!(frame.matches("<script").count(), 2, "{command:?}");
        assert!(!embedded(&page).contains('<'), "{command:?}");
    }
}

#[test]
fn a_page_goes_beside_a_table_and_never_over_an_input() {
    let folder = folder("outputs");
    let (table, text) = (folder.join("table.html"), folder.join("text.txt"));
    std::fs::write(&text, "And it came to pass in the days when the judges ruled. ".repeat(40)).unwrap();
    let compare = ["compare", "--tokens", "64", "--router", "phase", "--capacity-factor", "1", "--text"];
    let arguments = [&compare[..], &[text.to_str().unwrap(), "--report"]].concat();
    let output = run(&[&arguments[..], &[table.to_str().unwrap()]].concat());
    assert!(String::from_utf8_lossy(&output.stdout).contains("perplexity"));
    assert!(std::fs::read_to_string(&table).unwrap().trim_end().ends_with("</html>"));

    let nowhere = folder.join("no such folder/page.html");
    for (target, said) in [(&text, "--report"), (&nowhere, "--report")] {
        let before = std::fs::read(&text).unwrap();
        let refused = Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(&arguments).arg(target).output().unwrap();
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && stderr.contains(said), "{target:?}: {stderr}");
        assert_eq!((refused.stdout.len(), std::fs::read(&text).unwrap()), (0, before));
    }
}

/// Every page in one browser, one after another: starting it takes longer than looking.
#[test]
fn pages_work_in_a_browser() {
    let Some(browser) = Browser::start() else { return };
    let folder = folder("browser");
    let full = folder.join("full.html");
    let mut pages: Vec<PathBuf> = COMMANDS.iter().map(|command| reported(command, &folder).0).collect();
    // The page of a command is the same but for what it embeds.
    let page = std::fs::read_to_string(&pages[0]).unwrap();
    std::fs::write(&full, page.replace(embedded(&page), &FULL.replace('<', r"\u003c"))).unwrap();
    pages.push(full);
    browser.chromium("Browser.setDownloadBehavior", &json!({"behavior": "allow", "downloadPath": folder}));
    for path in &pages {
        let page = std::fs::read_to_string(path).unwrap();
        let document: Value = serde_json::from_str(embedded(&page)).unwrap();
        let opened =
            Opened { browser: &browser, document: &document, name: path.file_stem().unwrap().to_str().unwrap() };
        browser.open(path);
        opened.shows_what_there_is();
        opened.takes_text_as_text();
        opened.tells_values_where_the_mouse_is();
        opened.shows_every_choice();
        opened.shows_another_routers_loads();
        opened.lists_every_row();
        opened.fits_a_phone_in_the_dark();
        opened.gives_its_data(embedded(&page), &folder);
        let console = browser.console();
        assert!(console.is_empty(), "{}: {console:?}", opened.name);
    }
}

/// Whether the drawing in an element shows something: more than one colour on a canvas, shapes, rows, words.
const DRAWN: &str = r#"
const holder = document.querySelector(`[data-plot="${arguments[0]}"]`);
const colours = (canvas) => {
  if (!canvas.width || !canvas.height) return 0;
  // Read from a copy: Chromium warns of a canvas that is drawn on and read from.
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return new Set(new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer)).size;
};
const canvases = [...holder.querySelectorAll("canvas")];
if (canvases.length) return canvases.every((canvas) => colours(canvas) > 1);
const shapes = holder.querySelectorAll("svg .mark, .row .dot, .row .fill, td, dd, .t");
return shapes.length > 0 && holder.textContent.trim() !== "" && holder.getBoundingClientRect().height > 10;
"#;

/// A page that is open, and what it was made of.
struct Opened<'a> {
    browser: &'a Browser,
    document: &'a Value,
    name: &'a str,
}

impl Opened<'_> {
    fn plots(&self) -> BTreeSet<String> {
        let names = "return [...document.querySelectorAll('[data-plot]')].map((plot) => plot.dataset.plot)";
        strings(&self.browser.script(names, Value::Null)).into_iter().collect()
    }

    fn switches(&self) -> Vec<String> {
        let names = "return [...document.querySelectorAll('[data-switch]')].map((one) => one.dataset.switch)";
        strings(&self.browser.script(names, Value::Null))
    }

    fn all_drawn(&self) {
        for plot in self.plots() {
            wait_for(&format!("{}: drawing {plot}", self.name), || self.browser.script(DRAWN, plot.as_str()) == true);
        }
    }

    /// A drawing for all that the document has, none for what it has not, and each with something in it.
    fn shows_what_there_is(&self) {
        let plots = self.plots();
        let plots: BTreeSet<&str> = plots.iter().map(String::as_str).collect();
        assert_eq!(plots, expected_plots(self.document), "{}", self.name);
        self.all_drawn();
        let empty = "return [...document.querySelectorAll('section')].filter((one) => one.children.length < 2).map((one) => one.id)";
        assert_eq!(self.browser.script(empty, Value::Null), json!([]), "{}", self.name);
    }

    fn takes_text_as_text(&self) {
        let strange = "return [document.images.length, document.scripts.length, document.querySelectorAll('main b b, li b').length]";
        assert_eq!(self.browser.script(strange, Value::Null), json!([0, 2, 0]), "{}", self.name);
        let title = self.browser.script("return document.title", Value::Null);
        let command = self.document["command"].as_str().unwrap();
        assert!(title.as_str().unwrap().starts_with(&format!("phase-moe {command}")), "{title}");
        let shown = "return [...document.querySelectorAll('.words .t')].map((token) => token.textContent).join('')";
        let shown = self.browser.script(shown, Value::Null);
        for token in self.document["text"]["tokens"].as_array().into_iter().flatten() {
            let token = token.as_str().unwrap().trim();
            assert!(shown.as_str().unwrap().contains(token), "{}: {token} in {shown}", self.name);
        }
    }

    /// The mouse over each kind of drawing brings up words with a number.
    fn tells_values_where_the_mouse_is(&self) {
        let tables = ["advice", "load-ends", "figures"];
        for plot in self.plots().iter().filter(|plot| !tables.contains(&plot.as_str())) {
            let places = [".u-over", ".map canvas", "svg .mark", ".row", ".t"];
            let place = places.map(|place| format!("[data-plot=\"{plot}\"] {place}")).join(", ");
            let seen = "const one = document.querySelector(arguments[0]); one.scrollIntoView({ block: 'center', behavior: 'instant' });";
            self.browser.script(seen, place.as_str());
            let mut told = Value::Null;
            wait_for(&format!("{}: words over {plot}", self.name), || {
                self.browser.hover(&place);
                let words = "return document.querySelector('.tip.shown')?.querySelector('dl')?.textContent ?? ''";
                told = self.browser.script(words, Value::Null);
                told != ""
            });
            let number = |words: &str| words.contains(|letter: char| letter.is_ascii_digit());
            // Fates are words; their layers are numbers.
            assert!(
                number(told.as_str().unwrap()) || plot == "words" || plot == "residency",
                "{}: {plot}: {told}",
                self.name
            );
        }
    }

    /// The last choice of every switch, then the first again: drawings stay full.
    fn shows_every_choice(&self) {
        for which in ["last", "first"] {
            for switch in self.switches() {
                self.choose(&switch, which);
                self.all_drawn();
            }
        }
    }

    fn choose(&self, switch: &str, which: &str) {
        let choose = r"
const [name, which] = arguments[0];
const holder = document.querySelector(`[data-switch='${name}']`);
const select = holder.querySelector('select');
const at = (all) => (which === 'last' ? all.length - 1 : 0);
if (!select) return [...holder.querySelectorAll('input')].at(which === 'last' ? -1 : 0).click();
select.selectedIndex = at(select.options);
select.dispatchEvent(new Event('change'));";
        self.browser.script(choose, json!([switch, which]));
    }

    /// Another router, another map of loads.
    fn shows_another_routers_loads(&self) {
        if !self.switches().iter().any(|switch| switch == "load-router") {
            return;
        }
        let map =
            || self.browser.script("return document.querySelector('[data-plot=load] canvas').toDataURL()", Value::Null);
        let before = map();
        self.choose("load-router", "last");
        wait_for(&format!("{}: another map", self.name), || map() != before);
        self.choose("load-router", "first");
        wait_for(&format!("{}: the first map again", self.name), || map() == before);
    }

    /// The table has the rows of the result, with their figures.
    fn lists_every_row(&self) {
        let cells = "return [...document.querySelectorAll('[data-plot=figures] tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))";
        let shown = self.browser.script(cells, Value::Null);
        let Some(rows) = self.document["result"]["rows"].as_array() else { return };
        assert_eq!(shown.as_array().unwrap().len(), rows.len(), "{}", self.name);
        for (row, shown) in rows.iter().zip(shown.as_array().unwrap()) {
            let perplexity = format!("{:.3}", row["perplexity"].as_f64().unwrap());
            assert!(strings(shown).contains(&perplexity), "{}: {perplexity} in {shown}", self.name);
        }
    }

    /// As wide as a phone nothing has to be scrolled sideways but what scrolls in itself.
    fn fits_a_phone_in_the_dark(&self) {
        let phone = json!({"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": true});
        let dark = json!({"features": [{"name": "prefers-color-scheme", "value": "dark"}]});
        let paper = || self.browser.script("return getComputedStyle(document.body).backgroundColor", Value::Null);
        let light = paper();
        self.browser.chromium("Emulation.setDeviceMetricsOverride", &phone);
        self.browser.chromium("Emulation.setEmulatedMedia", &dark);
        wait_for(&format!("{}: a page as wide as a phone", self.name), || {
            self.browser.script("return document.documentElement.scrollWidth", Value::Null) == 360
        });
        assert_ne!(paper(), light, "{}", self.name);
        self.all_drawn();
        self.browser.chromium("Emulation.clearDeviceMetricsOverride", &json!({}));
        self.browser.chromium("Emulation.setEmulatedMedia", &json!({"features": []}));
    }

    /// The button gives the document to the letter.
    fn gives_its_data(&self, embedded: &str, folder: &Path) {
        let file = folder.join(format!("phase-moe-{}.json", self.document["command"].as_str().unwrap()));
        let _ = std::fs::remove_file(&file);
        self.browser.script("document.querySelector('[data-action=download]').click()", Value::Null);
        wait_for(&format!("{}: its data", self.name), || {
            std::fs::read_to_string(&file).is_ok_and(|data| data.len() == embedded.len())
        });
        assert!(std::fs::read_to_string(&file).unwrap() == embedded, "{}: other data", self.name);
    }
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
}

/// The drawings of a document, by what it has.
fn expected_plots(document: &Value) -> BTreeSet<&'static str> {
    let many = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
    let each = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let rows = each(&document["result"]["rows"]);
    let limited: Vec<&Value> =
        rows.iter().filter(|row| row["router"].is_string() && row["capacity_factor"].is_number()).collect();
    let layers: Vec<Value> = each(&document["runs"]).iter().flat_map(|run| each(&run["layers"])).collect();
    let of_rows = |key: &str| limited.iter().any(|row| row[key].is_number());
    let cache = each(&document["cache"]);
    let room = layers.iter().any(|layer| many(&layer["room"]));
    let there = [
        ("figures", true),
        ("advice", many(&document["result"]["per_memory"])),
        ("survival", of_rows("survival")),
        ("gate-mass", of_rows("gate_mass")),
        ("of-bound", of_rows("gate_mass_vs_bound")),
        ("perplexity", of_rows("perplexity")),
        ("prices", layers.iter().any(|layer| many(&layer["prices"]))),
        ("regret", layers.iter().any(|layer| many(&layer["room"]) && layer["bound"].is_number())),
        ("load", !layers.is_empty()),
        ("kinds", each(&document["kinds"]).iter().any(|kind| many(&kind["layers"]))),
        ("together", each(&document["together"]).iter().any(many)),
        ("words", many(&document["text"]["tokens"])),
        ("front", rows.iter().any(|row| row["cached_experts"].is_number())),
        ("bytes", cache.iter().any(|cache| cache["bytes_per_token"].is_number() || cache["hit_rate"].is_number())),
        ("residency", cache.iter().flat_map(|cache| each(&cache["layers"])).any(|layer| many(&layer["resident"]))),
        ("load-capacity", room),
        ("load-ends", room),
        ("headroom", room),
    ];
    there.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
}
