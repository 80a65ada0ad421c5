//! What commands write: never over what they read, never half, and nothing left behind.
#![cfg(unix)]

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use phase_moe::Checkpoint;
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};

const BINARY: &str = env!("CARGO_BIN_EXE_phase-moe");

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/goldens").join(name)
}

/// `logits` of a small model into `out`.
fn logits(model: &Path, out: &Path) -> Output {
    let mut command = Command::new(BINARY);
    command.arg("logits").arg("--model").arg(model).args(["--ids", "1,2,3", "--out"]).arg(out).output().unwrap()
}

/// The same by a shell that runs `before` first.
fn logits_after(before: &str, rest: &str, out: &Path) -> Output {
    let script = format!(r#"{before}; exec "$0" logits --model "$1" --ids 1,2,3 --out "$2" {rest}"#);
    let model = fixture("zoo/mixtral");
    Command::new("sh").args(["-c", &script, BINARY]).arg(model).arg(out).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn written(output: &Output, out: &Path) {
    assert!(output.status.success(), "{}", said(output));
    assert_eq!(Checkpoint::open(out).unwrap().entry("logits").unwrap().shape, [3, 61]);
}

fn names(directory: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = fs::read_dir(directory).unwrap().map(name).collect();
    names.sort();
    names
}

/// Mixtral's fixture in two shards, with a tokenizer's configuration that is read with it.
fn shards(directory: &Path) {
    let whole = Checkpoint::open(fixture("zoo/mixtral")).unwrap();
    let mut map = serde_json::Map::new();
    let mut parts = [Vec::new(), Vec::new()];
    for (at, (name, entry)) in whole.tensors().iter().enumerate() {
        let values: Vec<f32> =
            whole.read(name).unwrap().as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
        parts[at % 2].push(NamedTensor::f32(name, entry.shape.clone(), &values));
        map.insert(name.clone(), format!("part-{}.safetensors", at % 2).into());
    }
    for (at, tensors) in parts.iter().enumerate() {
        std::fs::write(directory.join(format!("part-{at}.safetensors")), tensor_bytes(tensors, None).unwrap()).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::copy(fixture("zoo/mixtral/config.json"), directory.join("config.json")).unwrap();
    fs::write(directory.join("generation_config.json"), "{}").unwrap();
}

#[test]
fn no_input_is_written_over_under_any_name() {
    let root = tempfile::tempdir().unwrap();
    let (model, elsewhere) = (root.path().join("model"), root.path().join("elsewhere"));
    fs::create_dir(&model).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    shards(&model);
    for name in names(&model) {
        let file = model.join(&name);
        let before = fs::read(&file).unwrap();
        let (hard, soft) = (elsewhere.join("hard"), elsewhere.join("soft"));
        fs::hard_link(&file, &hard).unwrap();
        symlink(&file, &soft).unwrap();
        for out in [file.clone(), model.join("..").join("model").join(&name), hard.clone(), soft.clone()] {
            let output = logits(&model, &out);
            let said = said(&output);
            assert_eq!(output.status.code(), Some(2), "{}: {said}", out.display());
            assert!(said.contains("expected another file than the model's ") && said.lines().count() == 1, "{said}");
            assert!(said.contains(&name), "{said}");
            assert_eq!(fs::read(&file).unwrap(), before, "{name}");
        }
        fs::remove_file(hard).unwrap();
        fs::remove_file(soft).unwrap();
    }
    // Beside the model's files there is room for others.
    let out = model.join("out.safetensors");
    written(&logits(&model, &out), &out);
}

#[test]
fn a_name_that_is_no_text_is_a_name() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join(OsStr::from_bytes(b"mod\xffel"));
    fs::create_dir(&model).unwrap();
    shards(&model);
    let output = logits(&model, &model.join("part-1.safetensors"));
    assert!(output.status.code() == Some(2) && said(&output).contains("expected another file"), "{}", said(&output));
    let out = root.path().join(OsStr::from_bytes(b"out\xfe"));
    written(&logits(&model, &out), &out);
}

/// A limit on the size of files stands for a full disk: the write fails on its way.
#[test]
fn what_was_there_is_whole_after_a_write_that_failed() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    fs::write(&out, "good").unwrap();
    let failed = logits_after("trap '' XFSZ; ulimit -f 0", "", &out);
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    assert!(said(&failed).contains("out: File too large") && said(&failed).lines().count() == 1, "{}", said(&failed));
    assert_eq!((fs::read(&out).unwrap(), names(root.path())), (b"good".to_vec(), vec!["out".to_owned()]));
    let none = logits_after("trap '' XFSZ; ulimit -f 0", "", &root.path().join("new"));
    assert_eq!((none.status.code(), names(root.path())), (Some(1), vec!["out".to_owned()]));
}

#[test]
fn a_run_that_fails_leaves_nothing_and_touches_nothing() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    fs::write(&out, "good").unwrap();
    let mut command = Command::new(BINARY);
    command.arg("logits").arg("--model").arg(fixture("zoo/mixtral")).args(["--ids", "99999", "--out"]).arg(&out);
    assert_eq!(command.output().unwrap().status.code(), Some(2));
    assert_eq!((fs::read(&out).unwrap(), names(root.path())), (b"good".to_vec(), vec!["out".to_owned()]));
}

#[test]
fn a_file_keeps_its_mode_and_a_new_one_has_that_of_the_user() {
    let root = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let out = root.path().join("out");
    for before in [0o600, 0o664, 0o755] {
        fs::write(&out, "old").unwrap();
        fs::set_permissions(&out, fs::Permissions::from_mode(before)).unwrap();
        written(&logits(&fixture("zoo/mixtral"), &out), &out);
        assert_eq!(mode(&out), before);
    }
    for (mask, expected) in [("022", 0o644), ("027", 0o640), ("077", 0o600)] {
        let out = root.path().join(mask);
        written(&logits_after(&format!("umask {mask}"), "", &out), &out);
        assert_eq!(mode(&out), expected, "{mask}");
    }
}

#[test]
fn of_a_symbolic_link_the_target_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    let (real, link, second) = (root.path().join("real"), root.path().join("link"), root.path().join("second"));
    symlink("real", &link).unwrap();
    symlink(&link, &second).unwrap();
    // First where there is nothing yet, then over what is there.
    for out in [&link, &second, &link] {
        let before = fs::metadata(&real).map(|file| file.ino()).ok();
        written(&logits(&fixture("zoo/mixtral"), out), &real);
        assert!(
            fs::symlink_metadata(&link).unwrap().is_symlink() && fs::symlink_metadata(&second).unwrap().is_symlink()
        );
        assert!(!fs::symlink_metadata(&real).unwrap().is_symlink());
        assert_ne!(fs::metadata(&real).map(|file| file.ino()).ok(), before, "another file in its place");
    }
    symlink("circle", root.path().join("circle")).unwrap();
    let circle = logits(&fixture("zoo/mixtral"), &root.path().join("circle"));
    assert!(circle.status.code() == Some(2) && said(&circle).contains("symbolic links"), "{}", said(&circle));
}

#[test]
fn what_is_no_file_is_written_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    assert!(logits(&fixture("zoo/mixtral"), Path::new("/dev/null")).status.success());
    assert!(!fs::metadata("/dev/null").unwrap().is_file());

    let whole = root.path().join("whole");
    written(&logits(&fixture("zoo/mixtral"), &whole), &whole);
    let whole = fs::read(&whole).unwrap();
    let piped = logits(&fixture("zoo/mixtral"), Path::new("/dev/stdout"));
    assert!(piped.status.success() && piped.stdout == whole, "{}", said(&piped));

    // What stands in the file that standard output goes to stays there.
    let log = root.path().join("log");
    fs::write(&log, "before\n").unwrap();
    let script = r#""$0" logits --model "$1" --ids 1,2,3 --out /dev/stdout >> "$2""#;
    let mut command = Command::new("sh");
    let appended = command.args(["-c", script, BINARY]).arg(fixture("zoo/mixtral")).arg(&log).output().unwrap();
    assert!(appended.status.success(), "{}", said(&appended));
    assert_eq!(fs::read(&log).unwrap(), [b"before\n".as_slice(), &whole].concat());

    let pipe = root.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || {
            let mut read = Vec::new();
            fs::File::open(pipe).unwrap().read_to_end(&mut read).unwrap();
            read
        }
    });
    assert!(logits(&fixture("zoo/mixtral"), &pipe).status.success());
    assert_eq!(reader.join().unwrap(), whole);
}

/// Root may write anywhere, so there is nothing to see then.
#[test]
fn what_may_not_be_written_is_said_before_the_run() {
    let root = tempfile::tempdir().unwrap();
    let closed = root.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    let file = root.path().join("file");
    fs::write(&file, "good").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    if fs::write(closed.join("probe"), "").is_ok() {
        return;
    }
    for out in [closed.join("out"), file.clone()] {
        // There is no such model: the place for the result is looked at first.
        let output = logits(&root.path().join("none"), &out);
        let said = said(&output);
        assert!(output.status.code() == Some(2) && said.contains("Permission denied"), "{said}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"good");
}
