//! `--model org/name`: a hub of our own on a socket, with a whole model, a gated one, one with shards and one whose connection breaks.

use std::process::{Command, Output};

fn run(home: &std::path::Path, endpoint: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    command.args(arguments).env("HF_HOME", home).env("HF_ENDPOINT", endpoint);
    command.env_remove("HF_TOKEN").env_remove("http_proxy").env_remove("HTTP_PROXY");
    command.env_remove("all_proxy").env_remove("ALL_PROXY");
    command.output().unwrap()
}

fn mistake(output: Output) -> String {
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), message.lines().count()), (Some(2), 1), "{message}");
    message
}

#[cfg(not(feature = "hub"))]
#[test]
fn without_the_feature_it_is_said_how_to_get_it() {
    let home = tempfile::tempdir().unwrap();
    let message = mistake(run(home.path(), "http://127.0.0.1:1", &["inspect", "--model", "org/name"]));
    let expected = "--model org/name: no such directory; for models on the hub, build with --features hub\n";
    assert_eq!(message, format!("phase-moe: {expected}"));
}

#[cfg(feature = "hub")]
mod with_hub {
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};

    use super::{mistake, run};

    const COMMIT: &str = "0123456789abcdef";

    /// A server that speaks as much of the hub's protocol as downloads need.
    struct Hub {
        endpoint: String,
        log: Arc<Mutex<Vec<String>>>,
        state: Arc<Mutex<State>>,
    }

    #[derive(Default)]
    struct State {
        /// Files by `model/file`.
        files: HashMap<String, Vec<u8>>,
        /// Bytes after which a file's connection breaks, as often as there are numbers.
        breaks: HashMap<String, Vec<usize>>,
    }

    impl Hub {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let (log, state) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<State>>::default());
            let hub = Self { endpoint, log: log.clone(), state: state.clone() };
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (log, state) = (log.clone(), state.clone());
                    std::thread::spawn(move || {
                        let _ = serve(stream, &log, &state);
                    });
                }
            });
            hub
        }

        /// Puts the files of `directory` onto the hub.
        fn add(&self, model: &str, directory: &Path) {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    let name = format!("{model}/{}", path.file_name().unwrap().to_string_lossy());
                    self.state.lock().unwrap().files.insert(name, std::fs::read(path).unwrap());
                }
            }
        }

        fn insert(&self, file: &str, bytes: Vec<u8>) {
            self.state.lock().unwrap().files.insert(file.into(), bytes);
        }

        fn log(&self) -> Vec<String> {
            std::mem::take(&mut self.log.lock().unwrap())
        }
    }

    /// One request, one answer.
    fn serve(stream: TcpStream, log: &Mutex<Vec<String>>, state: &Mutex<State>) -> std::io::Result<()> {
        let (mut reader, mut out) = (BufReader::new(stream.try_clone()?), stream);
        let (mut request, mut range) = (String::new(), None);
        reader.read_line(&mut request)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(asked) = line.strip_prefix("range: bytes=") {
                let (start, end) = asked.split_once('-').unwrap();
                range = Some((start.parse::<usize>().unwrap(), end.parse::<usize>().ok()));
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        log.lock().unwrap().push(format!("{path} {range:?}"));
        let answer = |out: &mut TcpStream, status: &str, headers: &str, body: &[u8]| -> std::io::Result<()> {
            write!(out, "HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n")?;
            out.write_all(body)
        };
        if path.contains("/org/gated") || path.starts_with("/org/gated") {
            return answer(&mut out, "403 Forbidden", "content-length: 0\r\n", b"");
        }
        if let Some(model) = path.strip_prefix("/api/models/") {
            let model = model.split("/revision").next().unwrap();
            let state = state.lock().unwrap();
            let of = |name: &String| Some(json!({ "rfilename": name.strip_prefix(&format!("{model}/"))? }));
            let siblings: Vec<Value> = state.files.keys().filter_map(of).collect();
            if siblings.is_empty() {
                return answer(&mut out, "404 Not Found", "content-length: 0\r\n", b"");
            }
            let body = json!({ "siblings": siblings, "sha": COMMIT }).to_string();
            let headers = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
            return answer(&mut out, "200 OK", &headers, body.as_bytes());
        }
        let file = path.trim_start_matches('/').replacen("/resolve/main/", "/", 1);
        let (bytes, cut) = {
            let mut state = state.lock().unwrap();
            let Some(bytes) = state.files.get(&file).cloned() else {
                return answer(&mut out, "404 Not Found", "content-length: 0\r\n", b"");
            };
            // Not for the request that asks how long it is.
            let breaks = state.breaks.get_mut(&file).filter(|_| range != Some((0, Some(0))));
            (bytes, breaks.filter(|breaks| !breaks.is_empty()).map(|breaks| breaks.remove(0)))
        };
        let (start, end) = range.unwrap_or((0, None));
        let part = &bytes[start..end.map_or(bytes.len(), |end| (end + 1).min(bytes.len()))];
        let headers = format!(
            "etag: \"{:x}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {start}-{}/{}\r\ncontent-length: {}\r\n",
            file.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte))),
            start + part.len() - 1,
            bytes.len(),
            part.len()
        );
        answer(&mut out, "206 Partial Content", &headers, &part[..cut.unwrap_or(part.len()).min(part.len())])
    }

    fn bundled() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-moe"))
    }

    fn json_of(home: &Path, hub: &str, arguments: &[&str]) -> Value {
        let output = run(home, hub, arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    const PROMPT: [&str; 6] = ["generate", "--prompt", "And God said", "--new-tokens", "8", "--json"];

    #[test]
    fn a_model_comes_once_and_is_there_without_a_network() {
        let (hub, home) = (Hub::new(), tempfile::tempdir().unwrap());
        hub.add("org/tiny", bundled());
        hub.insert("org/tiny/pytorch_model.bin", vec![1; 100]);
        hub.insert("org/tiny/generation_config.json", b"{\"eos_token_id\": [0]}".to_vec());
        let arguments = [&PROMPT[..], &["--model", "org/tiny"]].concat();
        let fetched = json_of(home.path(), &hub.endpoint, &arguments);
        let local = json_of(home.path(), &hub.endpoint, &PROMPT);
        assert_eq!(fetched["text"], local["text"]);
        let log = hub.log();
        let asked = |file: &str| log.iter().filter(|line| line.contains(file)).count();
        assert_eq!([asked("bin"), asked("README"), asked(".txt"), asked("chat_template")], [0; 4], "{log:?}");
        assert!(asked("model.safetensors") == 2 && asked("generation_config.json") == 2, "{log:?}");

        assert_eq!(json_of(home.path(), &hub.endpoint, &arguments)["text"], local["text"]);
        let log = hub.log();
        assert!(log.len() == 1 && log[0].starts_with("/api/models/org/tiny"), "only the list: {log:?}");
        assert_eq!(json_of(home.path(), "http://127.0.0.1:1", &arguments)["text"], local["text"]);
        let named = run(home.path(), "http://127.0.0.1:1", &["inspect", "--model", "org/tiny"]);
        assert!(String::from_utf8_lossy(&named.stdout).starts_with("org/tiny: olmoe"));
    }

    /// In the same run, and where that gives up in the next one.
    #[test]
    fn an_interrupted_download_goes_on_where_it_stopped() {
        let (hub, home) = (Hub::new(), tempfile::tempdir().unwrap());
        hub.add("org/tiny", bundled());
        let file = "org/tiny/model.safetensors".to_owned();
        hub.state.lock().unwrap().breaks.insert(file.clone(), vec![1_000_000, 500_000]);
        let arguments = ["inspect", "--json", "--model", "org/tiny"];
        let local = json_of(home.path(), &hub.endpoint, &["inspect", "--json"]);
        assert_eq!(json_of(home.path(), &hub.endpoint, &arguments), local);
        let log = hub.log();
        let ranges: Vec<&String> = log.iter().filter(|line| line.contains("model.safetensors")).collect();
        let starts: Vec<&&String> = ranges.iter().filter(|line| line.ends_with("None))")).collect();
        assert_eq!(starts.len(), 3, "{log:?}");
        assert!(
            starts[1].ends_with("Some((1000000, None))") && starts[2].ends_with("Some((1500000, None))"),
            "{log:?}"
        );

        let home = tempfile::tempdir().unwrap();
        hub.state.lock().unwrap().breaks.insert(file, vec![700_000, 10, 10]);
        let message = mistake(run(home.path(), &hub.endpoint, &arguments));
        assert!(message.contains("goes on from there next time"), "{message}");
        hub.log();
        assert_eq!(json_of(home.path(), &hub.endpoint, &arguments), local);
        let log = hub.log();
        assert!(log.iter().any(|line| line.ends_with("Some((700020, None))")), "{log:?}");
    }

    #[test]
    fn shards_come_by_their_index() {
        let (hub, home) = (Hub::new(), tempfile::tempdir().unwrap());
        hub.add("org/shards", bundled());
        let whole = hub.state.lock().unwrap().files.remove("org/shards/model.safetensors").unwrap();
        let checkpoint = phase_moe::Checkpoint::open(bundled()).unwrap();
        let shard = "model-00001-of-00001.safetensors";
        let map: HashMap<&String, &str> = checkpoint.tensors().keys().map(|name| (name, shard)).collect();
        hub.insert("org/shards/model.safetensors.index.json", json!({ "weight_map": map }).to_string().into());
        hub.insert(&format!("org/shards/{shard}"), whole);
        hub.insert("org/shards/other.safetensors", vec![0; 9]);
        let arguments = ["inspect", "--json", "--model", "org/shards"];
        let local = json_of(home.path(), &hub.endpoint, &["inspect", "--json"]);
        assert_eq!(json_of(home.path(), &hub.endpoint, &arguments), local);
        assert!(!hub.log().iter().any(|line| line.contains("other")));
    }

    #[test]
    fn mistakes_are_one_clear_line() {
        let (hub, home) = (Hub::new(), tempfile::tempdir().unwrap());
        hub.insert("org/empty/README.md", b"nothing".to_vec());
        hub.insert("org/half/config.json", b"{}".to_vec());
        let of = |model: &str, endpoint: &str| mistake(run(home.path(), endpoint, &["inspect", "--model", model]));
        for (model, expected) in [
            ("org/none", "--model org/none: no such directory, and the hub has no such model or file"),
            (
                "org/gated",
                "--model org/gated: no such directory, and the hub refuses it (403): it is gated, private or",
            ),
            ("org/half", "--model org/half: expected model.safetensors or model.safetensors.index.json on the hub"),
            ("org/empty", "on the hub, got neither"),
        ] {
            let message = of(model, &hub.endpoint);
            assert!(message.contains(expected), "{message}");
        }
        let message = of("org/none", "http://127.0.0.1:1");
        assert!(message.contains("--model org/none: no such directory, and the hub cannot be reached: "), "{message}");
    }
}
