//! The server whose push certificates these are.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use crate::outward;

/// A server that works is done long before.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which server, and the key to its API.
#[derive(Debug, Clone, Args)]
pub(super) struct ServerOptions {
    /// The running server
    #[arg(long, env = "WASMDM_SERVER", value_name = "URL", default_value = "http://127.0.0.1:9000")]
    server: String,
    /// File that holds the server's API key; the key itself may stand in the variable `WASMDM_API_KEY` [default: api-key in the data directory]
    #[arg(long, env = "WASMDM_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// The server's data directory
    #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
    data: PathBuf,
}

/// A topic as the server lists it.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) topic: String,
    pub(super) not_after: Option<String>,
    pub(super) days_left: Option<i64>,
    pub(super) channels: u64,
}

/// Its API.
pub(super) struct Server {
    url: Url,
    client: reqwest::Client,
    key: String,
}

impl ServerOptions {
    pub(super) fn connect(&self) -> anyhow::Result<Server> {
        // The text is not repeated: it may hold a password.
        let url = Url::parse(&self.server).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
        let url = url.context("server: write http://HOST:PORT or https://HOST")?;
        Ok(Server { url, client: outward::client(PATIENCE)?, key: self.key()? })
    }

    fn key(&self) -> anyhow::Result<String> {
        let (path, field) = match (&self.api_key_file, std::env::var("WASMDM_API_KEY")) {
            (None, Ok(key)) if !key.trim().is_empty() => return Ok(key.trim().to_owned()),
            (Some(path), _) => (path.clone(), "api-key-file"),
            (None, _) => (self.data.join("api-key"), "data"),
        };
        let key = std::fs::read_to_string(&path);
        let key = key.with_context(|| format!("{field}: the API key cannot be read from {}: give --api-key-file or --data", path.display()))?;
        if key.trim().is_empty() {
            bail!("{field}: {} is empty", path.display());
        }
        Ok(key.trim().to_owned())
    }
}

impl Server {
    /// Every topic that it has a certificate for, or devices.
    pub(super) async fn topics(&self) -> anyhow::Result<(serde_json::Value, Vec<Listed>)> {
        let (status, answer) = self.ask(Method::GET, "api/v1/push-certificates", &[], String::new()).await?;
        if status != StatusCode::OK {
            bail!("{}", refusal(status, &answer));
        }
        let topics = answer.get("push_certificates").cloned().unwrap_or_default();
        let topics = serde_json::from_value(topics).context("server: its list of push certificates is not understood; is it of another version?")?;
        Ok((answer, topics))
    }

    /// Stores certificate and key, if they are of that topic.
    pub(super) async fn store(&self, topic: &str, is_new: bool, pem: String) -> anyhow::Result<()> {
        if self.url.scheme() == "http" && !self.is_this_machine() {
            writeln!(std::io::stderr(), "warning: the private key goes to {} unencrypted; better run this on the server", self.host())?;
        }
        let mut query = vec![("topic", topic)];
        if is_new {
            query.push(("new_topic", "1"));
        }
        let (status, answer) = self.ask(Method::PUT, "v1/pushcert", &query, pem).await?;
        if status != StatusCode::OK {
            bail!("{}", refusal(status, &answer));
        }
        Ok(())
    }

    /// Without user and password, which an URL may have.
    fn host(&self) -> String {
        let port = self.url.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}{port}", self.url.host_str().unwrap_or_default())
    }

    fn is_this_machine(&self) -> bool {
        let host = self.url.host_str().unwrap_or_default();
        host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    async fn ask(&self, method: Method, path: &str, query: &[(&str, &str)], body: String) -> anyhow::Result<(StatusCode, serde_json::Value)> {
        let mut url = self.url.clone();
        url.set_path(path);
        url.set_query(None);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let nobody = || format!("server: {} does not answer: start the server, or name it with --server", self.host());
        let request = self.client.request(method, url).basic_auth("nanomdm", Some(&self.key)).body(body);
        let response = request.send().await.map_err(reqwest::Error::without_url).with_context(nobody)?;
        let status = response.status();
        let body = response.bytes().await.map_err(reqwest::Error::without_url).with_context(nobody)?;
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    }
}

/// The server's own sentence, if it has one.
fn refusal(status: StatusCode, answer: &serde_json::Value) -> String {
    if status == StatusCode::UNAUTHORIZED {
        return "api-key-file: the server does not take this API key".to_owned();
    }
    match answer.get("error").or_else(|| answer.get("detail")).and_then(serde_json::Value::as_str) {
        Some(sentence) => sentence.to_owned(),
        None => format!("server: it answers {status}; is it wasmdm?"),
    }
}
