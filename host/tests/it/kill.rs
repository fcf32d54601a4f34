//! `kill -9` at random moments, while a fleet lives: nothing that was answered 200 is ever missing, and the server starts again.
//!
//! `KILLS=200` kills so often under load; without it, as often as fits a little more than a minute. `KILL_SEED` chooses the moments.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use wasmdm::bundled::{ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use wasmdm_simulator::{ApiClient, Authority, JournalWriter, LivingFleet, LivingOptions, Target};

use crate::api::call_as;
use crate::fleet::{install_plugins, living};
use crate::plugins::{is_active, until};
use crate::process::{API_KEY, Home, ServerProcess, run};

const DEVICES: u64 = 36;
/// Without a number, kills go on for so long.
const BUDGET: Duration = Duration::from_secs(70);
/// And are at least so many, however slow the machine is.
const LEAST: u64 = 10;

/// A generator that is good enough to choose moments, and whose seed can be given again.
struct Moments(u64);

impl Moments {
    fn from_environment() -> Self {
        let seed = std::env::var("KILL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) | 1 << 40);
        println!("KILL_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below.max(1)
    }

    /// A moment within so many milliseconds. The moment is the point of these tests; nothing is waited for.
    async fn pass(&mut self, milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(self.next(milliseconds))).await;
    }
}

fn wanted() -> Option<u64> {
    std::env::var("KILLS").ok().map(|text| text.parse().expect("KILLS: a number"))
}

/// What goes on in the server when it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum During {
    Load,
    Backup,
    PluginReload,
    GracefulStop,
}

impl During {
    const fn of(number: u64) -> Self {
        match number % 10 {
            3 => Self::Backup,
            6 => Self::PluginReload,
            9 => Self::GracefulStop,
            _ => Self::Load,
        }
    }
}

/// What a backup that may have been interrupted left: nothing under its name, or a whole database.
fn backup_is_whole_or_absent(file: &Path) {
    if file.exists() {
        let (code, out, error) = run(&["db", "check", "--database", &format!("sqlite://{}", file.display())]);
        assert_eq!(code, 0, "{out}{error}");
        std::fs::remove_file(file).unwrap();
    }
}

/// Writes the policy's grant again, a little different, and asks for it to be loaded; does not wait until it is.
fn reload(home: &Home, server: &ServerProcess, number: u64) -> tokio::task::JoinHandle<()> {
    let grant = home.grants().join("serial-allow-list.toml");
    let text = std::fs::read_to_string(&grant).unwrap();
    let unfinished = grant.with_extension("unfinished");
    std::fs::write(
        &unfinished,
        format!("# {number}\n{}", text.split_once('\n').filter(|(first, _)| first.starts_with('#')).map_or(&*text, |(_, rest)| rest)),
    )
    .unwrap();
    std::fs::rename(&unfinished, &grant).unwrap();
    let url = server.url();
    TaskTracker::new().spawn(async move {
        // The server dies meanwhile: the answer does not matter.
        let request = reqwest::Client::new().post(format!("{url}/api/v1/plugins/serial-allow-list/reload"));
        let _ = request.header("authorization", format!("Bearer {API_KEY}")).send().await;
    })
}

/// Edge case 10.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kills_at_any_moment_lose_nothing_that_was_confirmed() {
    let mut moments = Moments::from_environment();
    let wanted = wanted();
    let authority = Arc::new(Authority::new(71).unwrap());
    let home = Home::new(&authority.root_pem());
    install_plugins(&home, "KILL", DEVICES);
    let server = home.start();
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE] {
        until(&server, plugin.name, is_active).await;
    }
    let home = home.at(server.address);
    let url = server.url();
    server.kill();
    let begin = Instant::now();
    let mut server = home.start();
    let start = u64::try_from(begin.elapsed().as_millis()).unwrap();
    println!("a start takes {start} ms");

    let journal_path = home.directory.path().join("journal");
    let journal = Arc::new(JournalWriter::open(&journal_path, || 0).unwrap());
    // They do something all the time, so that there is nearly always a request in the server.
    let usual = living("KILL", DEVICES, Some(Arc::clone(&journal)));
    let options = LivingOptions { rates: usual.rates.clone().times(10.0), mass_enqueue_every: Duration::from_millis(200), ..usual };
    let api = ApiClient::new(&url, API_KEY).unwrap();
    let fleet = LivingFleet::new(&authority, &Target::parse(&url).unwrap(), api, options).unwrap();
    let over = CancellationToken::new();
    let life = TaskTracker::new().spawn(fleet.live(over.clone()));

    let begin = Instant::now();
    let (mut kills, mut met, mut while_starting) = (0, 0, 0);
    let copy = home.directory.path().join("copy.sqlite");
    while !life.is_finished() && wanted.map_or(kills < LEAST || begin.elapsed() < BUDGET, |wanted| kills < wanted) {
        let during = During::of(kills);
        moments.pass(350).await;
        let mut backup = None;
        match during {
            During::Load => {}
            During::Backup => {
                let data = home.data();
                let arguments = ["db", "backup", "--data", &data.to_string_lossy(), &copy.to_string_lossy()];
                let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_wasmdm"));
                backup = Some(child.args(arguments).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap());
                moments.pass(100).await;
            }
            During::PluginReload => {
                drop(reload(&home, &server, kills));
                moments.pass(150).await;
            }
            During::GracefulStop => {
                server.terminate();
                moments.pass(100).await;
            }
        }
        let in_flight = journal.in_flight();
        server.kill();
        if let Some(mut backup) = backup {
            // Every other one dies as well.
            if moments.next(2) == 0 {
                let _ = backup.kill();
            }
            backup.wait().unwrap();
            backup_is_whole_or_absent(&copy);
        }
        kills += 1;
        // Also a start is killed now and then, also twice in a row.
        while moments.next(4) == 0 {
            let mut child = home.start_unheard();
            moments.pass(start).await;
            child.kill().unwrap();
            child.wait().unwrap();
            while_starting += 1;
        }
        server = home.start();
        let lost = journal.lost_of(&in_flight);
        met += u64::from(lost > 0);
        println!("kill {kills} ({during:?}, {} s): {lost} requests were not answered", begin.elapsed().as_secs());
    }
    let minutes = begin.elapsed().as_secs_f64() / 60.0;
    over.cancel();
    let report = life.await.unwrap().unwrap();
    println!("{}", report.to_text());
    println!("{kills} kills in {minutes:.1} minutes, {met} met unanswered requests; {while_starting} more while it started");
    // Requests without an answer are what is asked for here; anything else is a problem.
    assert!(report.is_success(), "{}", report.to_text());
    assert!(met * 4 >= kills * 3, "only {met} of {kills} kills met unanswered requests");
    println!("{}", home.check(&["--journal", &journal_path.to_string_lossy()]));
    // Also the server itself finds nothing wrong when it goes on.
    server.kill();
    drop(home.start());
    println!("{}", home.check(&[]));
}

/// The schema is made in steps: whichever of them is the last, the next start goes on from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_while_the_database_is_made_leave_one_that_goes_on() {
    let mut moments = Moments::from_environment();
    let authority = Authority::new(72).unwrap();
    let begin = Instant::now();
    drop(Home::new(&authority.root_pem()).start());
    let start = u64::try_from(begin.elapsed().as_millis()).unwrap();
    for _ in 0..wanted().map_or(8, |kills| kills.div_ceil(5)) {
        let home = Home::new(&authority.root_pem());
        for _ in 0..3 {
            let mut child = home.start_unheard();
            moments.pass(start + start / 4).await;
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let server = home.start();
        let answer = call_as(&server, http::Method::GET, "/readyz", "", "").await;
        assert_eq!(answer.status, http::StatusCode::OK, "{}", answer.excerpt());
        server.terminate();
        assert!(server.wait(), "it ends in order when it is asked to");
        home.check(&[]);
    }
}
