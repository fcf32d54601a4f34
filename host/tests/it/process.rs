//! The real program as a process of its own, as an operator runs it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use wasmdm_simulator::canary::{MARK, found};

/// It holds the canaries' mark: no log may show it.
pub(crate) const API_KEY: &str = "kanarienvogel-a-key-for-tests";

pub(crate) type Secrets = Arc<Mutex<Vec<String>>>;

/// A running `wasmdm serve`; killed when dropped. At its end its whole log and its metrics are searched for secrets.
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    /// Ends with the log.
    reader: Option<JoinHandle<()>>,
    /// What is secret beside all that holds the mark of the canaries.
    secrets: Secrets,
}

/// Where a server keeps its state, and whom it believes.
pub(crate) struct Home {
    pub(crate) directory: tempfile::TempDir,
    ca: Option<PathBuf>,
    listen: String,
    extra: Vec<String>,
    environment: Vec<(String, PathBuf)>,
    /// Words that no server of this home may show, also those that it learns while it runs.
    pub(crate) secrets: Secrets,
    /// Which server is started.
    pub(crate) program: PathBuf,
}

impl Home {
    /// An empty home whose server believes the authority of that PEM.
    pub(crate) fn new(root_pem: &str) -> Self {
        let mut home = Self::without_authority();
        let ca = home.directory.path().join("root.pem");
        std::fs::write(&ca, root_pem).unwrap();
        home.ca = Some(ca);
        home
    }

    /// An empty home whose server believes nobody.
    pub(crate) fn without_authority() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for folder in ["data/plugins", "data/plugins.d"] {
            std::fs::create_dir_all(directory.path().join(folder)).unwrap();
        }
        Self {
            directory,
            ca: None,
            listen: "127.0.0.1:0".to_owned(),
            extra: Vec::new(),
            environment: Vec::new(),
            secrets: Secrets::default(),
            program: env!("CARGO_BIN_EXE_wasmdm").into(),
        }
    }

    /// Adds a flag to every start.
    pub(crate) fn with(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(ToString::to_string));
        self
    }

    /// Leaves flags out of every later start.
    pub(crate) fn without(mut self, arguments: &[&str]) -> Self {
        self.extra.retain(|argument| !arguments.contains(&argument.as_str()));
        self
    }

    /// Adds a variable to every start.
    pub(crate) fn with_variable(mut self, name: &str, value: &Path) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Servers started from now on have that address, as devices expect of one that was restarted.
    pub(crate) fn at(mut self, address: SocketAddr) -> Self {
        self.listen = address.to_string();
        self
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn plugins(&self) -> PathBuf {
        self.data().join("plugins")
    }

    pub(crate) fn grants(&self) -> PathBuf {
        self.data().join("plugins.d")
    }

    /// A digest of each table, while the server runs.
    pub(crate) fn fingerprint(&self) -> std::collections::BTreeMap<String, String> {
        let data = self.data();
        let (code, out, error) = run(&["db", "fingerprint", "--data", &data.to_string_lossy()]);
        assert_eq!(code, 0, "{error}");
        out.lines().map(|line| line.split_once("  ").unwrap()).map(|(digest, table)| (table.to_owned(), digest.to_owned())).collect()
    }

    /// `wasmdm db check`, which must find nothing.
    pub(crate) fn check(&self, arguments: &[&str]) -> String {
        let data = self.data();
        let (code, out, error) = run(&[&["db", "check", "--data", &data.to_string_lossy()], arguments].concat());
        assert_eq!(code, 0, "{out}{error}");
        out
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--listen", &self.listen, "--api-key", API_KEY])
            .arg("--data")
            .arg(self.data())
            .args(self.ca.iter().flat_map(|ca| ["--ca".as_ref(), ca.as_os_str()]))
            .args(&self.extra)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Starts a server and waits for nothing.
    pub(crate) fn start_unheard(&self) -> Child {
        self.command().stderr(Stdio::null()).spawn().unwrap()
    }

    /// Starts a server and waits until it listens.
    pub(crate) fn start(&self) -> ServerProcess {
        ServerProcess::start(self)
    }
}

impl ServerProcess {
    fn start(home: &Home) -> Self {
        let mut child = home.command().stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (announce, announced) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let kept = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("wasmdm listens on ") {
                    // The field follows the message.
                    let _ = announce.send(address.split_whitespace().next().unwrap_or_default().to_owned());
                }
                kept.lock().unwrap().push(line);
            }
        });
        match announced.recv_timeout(std::time::Duration::from_secs(60)) {
            Ok(address) => Self { child, address: address.parse().unwrap(), log, reader: Some(reader), secrets: Arc::clone(&home.secrets) },
            Err(_) => {
                let _ = child.kill();
                panic!("the server did not start: {:#?}", log.lock().unwrap())
            }
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All log lines so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line that holds all of these.
    pub(crate) async fn logs(&self, parts: &[&str]) {
        for _ in 0..1000 {
            if self.log().iter().any(|line| parts.iter().all(|part| line.contains(part))) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("no line has {parts:?}: {:#?}", self.log());
    }

    /// Asks it to end, and does not wait.
    pub(crate) fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Once it has ended by itself: whether in order.
    pub(crate) fn wait(mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end, as a service manager does, and waits until it has.
    pub(crate) fn stop(mut self) {
        let metrics = self.metrics();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        let leaks = self.leaks(&metrics);
        assert!(leaks.is_empty(), "{leaks:#?}");
    }

    /// Ends it, and answers which secrets its log and its metrics show.
    pub(crate) fn finish(&mut self) -> Vec<String> {
        let metrics = self.metrics();
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.leaks(&metrics)
    }

    /// As they are now; nothing if it does not answer.
    fn metrics(&mut self) -> Vec<u8> {
        let mut answer = Vec::new();
        if self.reader.is_none() || !matches!(self.child.try_wait(), Ok(None)) {
            return answer;
        }
        let patience = Some(std::time::Duration::from_secs(5));
        if let Ok(mut connection) = TcpStream::connect(self.address) {
            let _ = connection.set_read_timeout(patience);
            let _ = connection.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let _ = connection.read_to_end(&mut answer);
        }
        answer
    }

    /// Once, after the end of the process.
    fn leaks(&mut self, metrics: &[u8]) -> Vec<String> {
        let Some(reader) = self.reader.take() else {
            return Vec::new();
        };
        let _ = reader.join();
        let log = self.log().join("\n");
        let mut leaks = Vec::new();
        for secret in self.secrets.lock().unwrap().iter().map(String::as_str).chain([MARK]) {
            for (place, content) in [("log", log.as_bytes()), ("metrics", metrics)] {
                leaks.extend(found(secret, content).map(|leak| format!("{place}: {leak}")));
            }
        }
        leaks
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        resident(self.pid())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let leaks = self.finish();
        // A test that has failed already says why by itself.
        assert!(leaks.is_empty() || std::thread::panicking(), "a secret is shown: {leaks:#?}");
    }
}

fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Runs a subcommand to its end: exit code, standard output, standard error.
pub(crate) fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_wasmdm")).args(arguments).stdin(Stdio::null()).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Puts a plugin into a plugin directory, each file complete before it has its name.
pub(crate) fn install(plugins: &Path, name: &str, manifest: &str, component: &[u8]) {
    let folder = plugins.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let wasm = manifest.lines().find_map(|line| line.strip_prefix("wasm = \"")).map_or("plugin.wasm", |rest| rest.trim_end_matches('"'));
    for (file, content) in [(wasm, component), ("plugin.toml", manifest.as_bytes())] {
        let unfinished = folder.join(format!(".{file}.new"));
        std::fs::write(&unfinished, content).unwrap();
        std::fs::rename(&unfinished, folder.join(file)).unwrap();
    }
}
