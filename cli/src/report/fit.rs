//! A document made short enough for its page, with a word about what was left out.
//!
//! A collector takes care of what is worth showing; this holds whatever comes to the page's size. What can be missed most easily goes
//! first: text and residency are halved, layers thinned out, runs taken from the end, at last rows and texts of the result.

use serde_json::{Value, json};

use super::page::in_script;

/// Tokens of text and steps of residency below which other things go first.
const FEW: usize = 512;

/// Layers below which other things go first.
const FEW_LAYERS: usize = 8;

/// A way to shorten a document: true if it did.
type Cut = fn(&mut Value) -> bool;

/// In their order, each with what the page says of it.
const CUTS: [(Cut, &str); 9] = [
    (|document| halve_text(document, FEW), "only the beginning of the text is shown"),
    (|document| halve_residency(document, FEW), "residency is shown for the first steps alone"),
    (|document| thin_layers(document, FEW_LAYERS), "not every layer is shown"),
    (|document| halve_text(document, 1), "only the beginning of the text is shown"),
    (|document| halve_residency(document, 1), "residency is shown for the first steps alone"),
    (|document| take(document, "together"), "which experts are chosen together is left out"),
    (|document| halve(&mut document["runs"], 1), "of some routers only the figures are shown"),
    (
        |document| ["text", "cache", "kinds", "runs"].into_iter().any(|key| take(document, key)),
        "text and maps are left out",
    ),
    (halve_result, "rows and texts are cut off; --json prints all of them"),
];

/// The document as JSON for a script, of at most `most` bytes.
pub fn fit(document: &Value, most: usize) -> String {
    let mut whole = in_script(document);
    if whole.len() <= most {
        return whole;
    }
    let mut document = document.clone();
    let mut said: Vec<&str> = Vec::new();
    for (cut, word) in CUTS {
        while whole.len() > most && cut(&mut document) {
            if !said.contains(&word) {
                said.push(word);
            }
            let mut noted = document.clone();
            note(&mut noted, &said);
            whole = in_script(&noted);
        }
    }
    if whole.len() > most {
        // What is left has no end of its own: a name, a key. Nothing that a command makes comes here.
        let note = "the run's figures are too long for a page; --json prints them";
        whole = in_script(&json!({"command": "", "result": {}, "notes": [note]}));
    }
    whole
}

fn note(document: &mut Value, said: &[&str]) {
    let words = format!("To keep this page short, {}.", said.join("; "));
    match &mut document["notes"] {
        Value::Array(notes) => notes.push(words.into()),
        notes => *notes = json!([words]),
    }
}

/// Takes a list or a member out.
fn take(document: &mut Value, key: &str) -> bool {
    match document.get_mut(key) {
        Some(Value::Array(list)) if !list.is_empty() => {
            list.clear();
            true
        }
        Some(member @ Value::Object(_)) => {
            *member = Value::Null;
            true
        }
        _ => false,
    }
}

/// Halves a list that is longer than `few`.
fn halve(list: &mut Value, few: usize) -> bool {
    let Some(list) = list.as_array_mut().filter(|list| list.len() > few) else { return false };
    list.truncate((list.len() / 2).max(few));
    true
}

fn each<'a>(value: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    value.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Halves the shown tokens and what is said of each.
fn halve_text(document: &mut Value, few: usize) -> bool {
    let Some(text) = document.get_mut("text").filter(|text| text.is_object()) else { return false };
    let before = text["tokens"].as_array().map_or(0, Vec::len);
    if !halve(&mut text["tokens"], few) {
        return false;
    }
    let shown = text["tokens"].as_array().map_or(0, Vec::len);
    let begun = text["sequences"].as_array().into_iter().flatten();
    let begun = begun.filter(|start| start.as_u64().is_some_and(|start| start < shown as u64)).count();
    for key in ["sequences", "kinds"] {
        text.get_mut(key).and_then(Value::as_array_mut).into_iter().for_each(|list| list.truncate(begun));
    }
    for words in each(document, "runs").flat_map(|run| each(run, "words")) {
        for key in ["fate", "misses"] {
            if let Some(Value::String(letters)) = words.get_mut(key) {
                *letters = letters.chars().take(shown).collect();
            }
        }
        if let Some(Value::Array(experts)) = words.get_mut("experts") {
            experts.truncate(experts.len() / before.max(1) * shown);
        }
    }
    true
}

fn halve_residency(document: &mut Value, few: usize) -> bool {
    let mut cut = false;
    for layer in each(document, "cache").flat_map(|cache| each(cache, "layers")) {
        if halve(&mut layer["resident"], few) {
            layer["shown"] = layer["resident"].as_array().map_or(0, Vec::len).into();
            cut = true;
        }
    }
    cut
}

/// Leaves every second layer out, of all that is said layer by layer.
fn thin_layers(document: &mut Value, few: usize) -> bool {
    if each(document, "layers").count() <= few {
        return false;
    }
    for key in ["layers", "together"] {
        document.get_mut(key).into_iter().for_each(thin);
    }
    for key in ["runs", "kinds", "cache"] {
        for of_one in each(document, key) {
            for key in ["layers", "words"] {
                of_one.get_mut(key).into_iter().for_each(thin);
            }
        }
    }
    true
}

fn thin(list: &mut Value) {
    if let Value::Array(list) = list {
        let every_second = std::mem::take(list).into_iter().step_by(2);
        list.extend(every_second);
    }
}

/// Halves what the result itself has without end.
fn halve_result(document: &mut Value) -> bool {
    let Some(result) = document.get_mut("result") else { return false };
    let mut cut = false;
    for key in ["rows", "texts"] {
        cut |= result.get_mut(key).is_some_and(|list| halve(list, 1));
    }
    cut |= result.get_mut("text").is_some_and(halve_words);
    for text in each(result, "texts") {
        cut |= ["prompt", "text"]
            .into_iter()
            .filter_map(|key| text.get_mut(key).map(halve_words))
            .fold(false, |a, b| a | b);
    }
    cut
}

/// Halves a text of more than a line.
fn halve_words(words: &mut Value) -> bool {
    let Value::String(words) = words else { return false };
    let letters = words.chars().count();
    if letters > 200 {
        *words = words.chars().take(letters / 2).collect();
    }
    letters > 200
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(tokens: usize, layers: usize, experts: usize) -> Value {
        let per_layer = |make: &dyn Fn(usize) -> Value| (0..layers).map(make).collect::<Vec<_>>();
        let loads = json!(vec![1000; experts]);
        let words = json!({"fate": "=".repeat(tokens), "experts": vec![7; tokens * 2], "misses": "0".repeat(tokens)});
        let run = json!({
            "name": "phase", "layers": per_layer(&|_| json!({"demand": loads, "loads": loads})), "words": per_layer(&|_| words.clone()),
        });
        json!({
            "command": "compare", "run": {"command_line": "phase-moe compare"}, "result": {"rows": [{"router": "phase"}]},
            "notes": ["kept"], "layers": (0..layers).collect::<Vec<_>>(), "top_k": 2,
            "text": {"tokens": vec!["<"; tokens], "sequences": [0, tokens / 2], "kinds": ["a", "b"], "total": tokens},
            "runs": [run.clone(), run], "kinds": [{"name": "a", "layers": per_layer(&|_| loads.clone())}],
            "together": per_layer(&|_| json!(vec![0; experts * experts])),
            "cache": [{"layers": per_layer(&|_| json!({"steps": tokens, "shown": tokens, "resident": vec!["ff"; tokens]}))}],
        })
    }

    #[test]
    fn what_fits_is_left_alone() {
        let document = long(8, 2, 4);
        assert_eq!(serde_json::from_str::<Value>(&fit(&document, 100_000)).unwrap(), document);
    }

    #[test]
    fn a_long_text_is_cut_with_all_that_is_said_of_it() {
        let document = long(4096, 2, 4);
        let fitted: Value = serde_json::from_str(&fit(&document, 100_000)).unwrap();
        let shown = fitted["text"]["tokens"].as_array().unwrap().len();
        assert!((FEW..4096).contains(&shown), "{shown}");
        for run in fitted["runs"].as_array().unwrap() {
            for layer in run["words"].as_array().unwrap() {
                assert_eq!(layer["fate"].as_str().unwrap().len(), shown);
                assert_eq!(layer["experts"].as_array().unwrap().len(), 2 * shown);
            }
        }
        assert_eq!((&fitted["text"]["sequences"], &fitted["text"]["kinds"]), (&json!([0]), &json!(["a"])));
        assert_eq!(fitted["notes"][0], "kept");
        let said = fitted["notes"][1].as_str().unwrap();
        assert!(said.starts_with("To keep this page short, only the beginning of the text"), "{said}");
        assert_eq!((&fitted["result"], &fitted["text"]["total"]), (&document["result"], &document["text"]["total"]));
    }

    #[test]
    fn many_layers_are_thinned_out_alike() {
        let fitted: Value = serde_json::from_str(&fit(&long(16, 64, 64), 200_000)).unwrap();
        let layers = fitted["layers"].as_array().unwrap();
        assert!(layers.len() < 64 && layers[1].as_u64().unwrap() > 1, "{layers:?}");
        let as_many = |list: &Value| assert_eq!(list.as_array().unwrap().len(), layers.len());
        as_many(&fitted["runs"][0]["layers"]);
        as_many(&fitted["runs"][0]["words"]);
        as_many(&fitted["kinds"][0]["layers"]);
        as_many(&fitted["cache"][0]["layers"]);
    }

    #[test]
    fn whatever_comes_is_short_enough() {
        let mut endless = long(20_000, 12, 128);
        let row = json!({"router": "phase", "text": "<".repeat(1000)});
        endless["result"] = json!({"rows": vec![row; 2000], "text": "<".repeat(1_000_000)});
        for most in [2_000_000, 50_000, 6_000] {
            let fitted = fit(&endless, most);
            let document: Value = serde_json::from_str(&fitted).unwrap();
            assert!(fitted.len() <= most && document["notes"].is_array(), "{most}: {}", fitted.len());
        }
        let named = json!({"command": "a".repeat(10_000), "notes": []});
        assert!(fit(&named, 1000).len() <= 1000);
    }
}
