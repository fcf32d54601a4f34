//! The real program as a process of its own, as an operator runs it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

pub(crate) const API_KEY: &str = "a-key-for-tests";

/// A running `wasmdm serve`; killed when dropped.
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

/// Where a server keeps its state, and whom it believes.
pub(crate) struct Home {
    pub(crate) directory: tempfile::TempDir,
    ca: Option<PathBuf>,
    listen: String,
    extra: Vec<String>,
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
        Self { directory, ca: None, listen: "127.0.0.1:0".to_owned(), extra: Vec::new(), program: env!("CARGO_BIN_EXE_wasmdm").into() }
    }

    /// Adds a flag to every start.
    pub(crate) fn with(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(ToString::to_string));
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
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("wasmdm listens on ") {
                    // The field follows the message.
                    let _ = announce.send(address.split_whitespace().next().unwrap_or_default().to_owned());
                }
                kept.lock().unwrap().push(line);
            }
        });
        match announced.recv_timeout(std::time::Duration::from_secs(60)) {
            Ok(address) => Self { child, address: address.parse().unwrap(), log },
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

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        resident(self.pid())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
