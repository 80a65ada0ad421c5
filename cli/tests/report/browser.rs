//! A headless Chromium by its driver: WebDriver is JSON over HTTP. The driver ends with its value, whatever a test does.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

pub struct Browser {
    driver: Child,
    agent: ureq::Agent,
    session: String,
}

impl Browser {
    /// `None`, said on stderr, where there is no Chromium or no driver.
    pub fn start() -> Option<Self> {
        for program in ["chromium", "chromedriver"] {
            let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            if !there.is_ok_and(|status| status.success()) {
                eprintln!("skipped: there is no {program} here to open reports with");
                return None;
            }
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut driver = Command::new("chromedriver");
        let driver = driver.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
        let agent = config.timeout_global(Some(Duration::from_secs(60))).build().into();
        let mut browser = Self { driver, agent, session: format!("http://127.0.0.1:{port}/session") };
        let arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let status = format!("http://127.0.0.1:{port}/status");
        wait_for("the driver", || browser.agent.get(&status).call().is_ok());
        let session = browser.post("", &wanted)["sessionId"].as_str().unwrap().to_owned();
        browser.session = format!("{}/{session}", browser.session);
        Some(browser)
    }

    fn post(&self, command: &str, body: &Value) -> Value {
        let mut answer = self.agent.post(format!("{}{command}", self.session)).send_json(body).unwrap();
        let status = answer.status();
        let mut answer: Value = answer.body_mut().read_json().unwrap();
        assert!(status.is_success(), "{command}: {answer}");
        answer["value"].take()
    }

    pub fn open(&self, page: &Path) {
        self.post("/url", &json!({"url": format!("file://{}", page.display())}));
    }

    /// What a script returns, which may use `arguments[0]`.
    pub fn script(&self, script: &str, argument: impl Into<Value>) -> Value {
        self.post("/execute/sync", &json!({"script": script, "args": [argument.into()]}))
    }

    /// Moves the mouse into the middle of the element that `selector` finds.
    pub fn hover(&self, selector: &str) {
        let element = self.post("/element", &json!({"using": "css selector", "value": selector}));
        let moves = json!([{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": element}]);
        let mouse = json!({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves});
        self.post("/actions", &json!({"actions": [mouse]}));
    }

    /// A command of Chromium's own protocol.
    pub fn chromium(&self, command: &str, parameters: &Value) {
        self.post("/goog/cdp/execute", &json!({"cmd": command, "params": parameters}));
    }

    /// What the console has had since this was last asked.
    pub fn console(&self) -> Vec<Value> {
        self.post("/se/log", &json!({"type": "browser"})).as_array().unwrap().clone()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser is the driver's child: asked to go first, so that it is not left behind.
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// Waits for what a page does in its own time.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what}: nothing within ten seconds");
}
