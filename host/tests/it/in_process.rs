//! The same server in this process, with a clock that the test moves.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wasmdm::config::{Config, ServeOptions};
use wasmdm::wiring::{RunningServer, Surroundings};
use wasmdm_plugin_runtime::loading::CompilerCommand;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock as _;
use wasmdm_simulator::Authority;
use wasmdm_testkit::clock::ManualClock;

use crate::process::install;

pub(crate) struct Server {
    pub(crate) running: RunningServer,
    pub(crate) clock: ManualClock,
    home: tempfile::TempDir,
}

impl Server {
    /// A server with these plugins (name, manifest, component, grant file), all of them active.
    pub(crate) async fn start(authority: &Authority, plugins: &[(&str, &str, &[u8], &str)]) -> Self {
        Self::start_with(authority, plugins, ServeOptions::default()).await
    }

    /// As [`Self::start`], with more than the usual options.
    pub(crate) async fn start_with(authority: &Authority, plugins: &[(&str, &str, &[u8], &str)], more: ServeOptions) -> Self {
        Self::start_configured(authority, plugins, more, |_| ()).await
    }

    /// As [`Self::start_with`], with what no option says.
    pub(crate) async fn start_configured(
        authority: &Authority,
        plugins: &[(&str, &str, &[u8], &str)],
        more: ServeOptions,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        std::fs::create_dir_all(data.join("plugins.d")).unwrap();
        std::fs::write(home.path().join("ca.pem"), authority.root_pem()).unwrap();
        for (name, manifest, component, grant) in plugins {
            std::fs::write(data.join("plugins.d").join(format!("{name}.toml")), grant).unwrap();
            install(&data.join("plugins"), name, manifest, component);
        }
        let options = ServeOptions {
            listen: Some("127.0.0.1:0".to_owned()),
            data: Some(data),
            ca: Some(home.path().join("ca.pem")),
            api_key: Some(crate::process::API_KEY.to_owned()),
            ..more
        };
        let clock = ManualClock::new(Timestamp::from_millis(1_800_000_000_000));
        let surroundings = Surroundings {
            clock: Arc::new(clock.clone()),
            compiler: CompilerCommand { program: env!("CARGO_BIN_EXE_wasmdm").into(), args: vec!["__compile-plugin".into()] },
            pusher: None,
        };
        let mut config = options.resolve().unwrap();
        configure(&mut config);
        let running = RunningServer::start(config, surroundings).await.unwrap();
        let server = Self { running, clock, home };
        server
            .until("the plugins are active", || {
                let status = server.running.plugins.status();
                status.len() == plugins.len() && status.iter().all(|plugin| plugin.state == wasmdm_plugin_runtime::loading::State::Active)
            })
            .await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.running.address)
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.home.path().join("data/wasmdm.sqlite")
    }

    /// Waits until nothing is waiting in the outbox that could be delivered now.
    pub(crate) async fn quiet(&self) {
        for _ in 0..2000 {
            let (waiting, _) = self.running.storage.outbox_lag(self.clock.now()).await.unwrap();
            if waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!(
            "the outbox did not become empty: {:#?}",
            self.running.storage.dead_letters(&wasmdm_protocol::enrollment::TenantId::default(), None, 10).await
        );
    }

    async fn until(&self, what: &str, mut happened: impl FnMut() -> bool) {
        for _ in 0..6000 {
            if happened() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("waited in vain until {what}: {:#?}", self.running.plugins.status());
    }

    pub(crate) async fn stop(self) {
        self.running.stop().await.unwrap();
        drop(self.home);
    }
}
