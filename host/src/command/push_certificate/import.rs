//! `wasmdm push-certificate import`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use wasmdm_apns::push_certificate::PushCertificatePair;
use wasmdm_service::clock::Clock as _;
use wasmdm_storage::push_certificate_expiry::days_left;

use super::server::{Listed, ServerOptions};
use super::{password, read};
use crate::clock::SystemClock;

/// Store a certificate from Apple.
#[derive(Debug, Args)]
pub struct ImportOptions {
    /// The certificate (PEM or DER), both in one PEM file, or a PKCS#12 file (.p12, .pfx) with both
    certificate: PathBuf,
    /// The key, if it is in a file of its own (PEM or PKCS#12), such as the `key.pem` of `push-certificate request`
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// File with the password of the key or the PKCS#12 file, `-` for standard input; it may also stand in the variable
    /// `WASMDM_PUSH_CERTIFICATE_PASSWORD`
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Refuse the certificate unless it is of this topic
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Add a further topic to those that the server has; without it, a certificate of another topic is refused
    #[arg(long)]
    new_topic: bool,
    #[command(flatten)]
    server: ServerOptions,
}

/// Checks it here, then against what the server has, then stores it.
pub(super) async fn run(options: ImportOptions) -> anyhow::Result<ExitCode> {
    let password = password("password-file", options.password_file.as_deref(), "WASMDM_PUSH_CERTIFICATE_PASSWORD")?;
    let mut files = vec![read("certificate", &options.certificate)?];
    if let Some(key) = &options.key {
        files.push(read("key", key)?);
    }
    let pair = PushCertificatePair::read_all(&files, password.as_deref())?;
    let now = SystemClock.now();
    pair.check_validity(now)?;
    if let Some(topic) = &options.topic {
        pair.check_topic(topic)?;
    }
    let server = options.server.connect()?;
    let (_, topics) = server.topics().await?;
    let known = topics.iter().find(|known| known.topic == pair.topic);
    if known.is_none() && !options.new_topic {
        check_known(&pair, &topics)?;
    }
    let PushCertificatePair { topic, not_after, serial, certificate_pem, private_key_pem, .. } = pair;
    server.store(&topic, options.new_topic, format!("{certificate_pem}\n{private_key_pem}")).await?;
    let mut out = std::io::stdout();
    writeln!(out, "stored: topic {topic}")?;
    writeln!(out, "        serial number {serial}, ends at {not_after} (in {} days)", days_left(not_after, now))?;
    let whose = match known {
        Some(Listed { channels, not_after: Some(before), .. }) => format!("in place of one that ends at {before}, for {channels} channels"),
        Some(Listed { channels, .. }) => format!("for {channels} channels, which had none"),
        None => "no device uses this topic yet: give it to your enrollment profile as `Topic`".to_owned(),
    };
    writeln!(out, "        {whose}")?;
    writeln!(out, "Renew it before it ends, with the same Apple account: a new one would be of another topic, and reach no device.")?;
    Ok(ExitCode::SUCCESS)
}

/// The server refuses a new topic only where devices would be lost; here whoever runs this may have enrollment profiles of the topic
/// that nobody has installed yet.
fn check_known(pair: &PushCertificatePair, topics: &[Listed]) -> anyhow::Result<()> {
    match topics {
        [] => Ok(()),
        [only] => match pair.check_topic(&only.topic) {
            Ok(()) => Ok(()),
            Err(problem) => bail!("{problem}, or add --new-topic if this is a further topic"),
        },
        _ => bail!(
            "certificate: its topic `{}` is none of the {} that the server has: renew the certificate that is in use, or add --new-topic if this is a \
             further topic",
            pair.topic,
            topics.len()
        ),
    }
}
