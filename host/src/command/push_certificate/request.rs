//! `wasmdm push-certificate request`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use wasmdm_apns::signing_request::{Subject, Vendor, signing_request, signing_request_of, vendor_file, vendor_signed};

use super::{password, read};

/// Make a key and a signing request.
#[derive(Debug, Args)]
pub struct RequestOptions {
    /// Directory of the key and the requests; a key that is there is used again, never overwritten
    #[arg(long, value_name = "DIR", default_value = "push-certificate")]
    dir: PathBuf,
    /// Who asks, for the vendor to see: any name, such as that of the organization
    #[arg(long, value_name = "NAME", default_value = "MDM push certificate")]
    common_name: String,
    /// Where the vendor answers
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    /// Country, two letters
    #[arg(long, value_name = "CODE")]
    country: Option<String>,
    /// For who has Apple's MDM vendor certificate: it, its issuer, and Apple's root, in this order, in one file (PEM, or PKCS#12 with the key)
    /// or in several (PEM or DER; repeatable). The request is signed then
    #[arg(long = "vendor-certificate", value_name = "FILE")]
    vendor_certificates: Vec<PathBuf>,
    /// The vendor certificate's key (PEM or PKCS#12), if it is in a file of its own
    #[arg(long, value_name = "FILE", requires = "vendor_certificates")]
    vendor_key: Option<PathBuf>,
    /// File with the password of the vendor's key, `-` for standard input; it may also stand in the variable `WASMDM_VENDOR_PASSWORD`
    #[arg(long, value_name = "FILE", requires = "vendor_certificates")]
    vendor_password_file: Option<PathBuf>,
}

/// Makes what is not there yet, and says what comes next.
pub(super) fn run(options: &RequestOptions) -> anyhow::Result<ExitCode> {
    let subject = Subject { common_name: options.common_name.clone(), email: options.email.clone(), country: options.country.clone() };
    let (key, csr, signed) = (options.dir.join("key.pem"), options.dir.join("request.csr"), options.dir.join("request-for-apple.txt"));
    // Read before anything is made: what is wrong with it is said while nothing has changed.
    let vendor = VendorFiles::read(options)?;
    let mut out = std::io::stdout();
    let request = if key.try_exists().context("dir")? {
        let text = String::from_utf8(read("key", &key)?).with_context(|| format!("key: {} is no PEM file", key.display()))?;
        let made = signing_request_of(&subject, &text).with_context(|| format!("key: {}", key.display()))?;
        writeln!(out, "{}: the key that was there is used again", key.display())?;
        made.request_pem
    } else {
        let made = signing_request(&subject)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&options.dir)
            .with_context(|| format!("dir: {} cannot be made", options.dir.display()))?;
        keep_key(&key, &made.private_key_pem)?;
        writeln!(out, "{}: a new key. Keep it: the certificate is of no use without it", key.display())?;
        made.request_pem
    };
    replace(&csr, &request)?;
    writeln!(out, "{}: the signing request", csr.display())?;
    match vendor {
        Some(vendor) => {
            replace(&signed, &vendor.sign(request.as_bytes())?)?;
            writeln!(out, "{}: the request as the vendor has signed it\n\nNext:", signed.display())?;
            next_steps(&mut out, &signed, &key)?;
        }
        None => {
            writeln!(out, "\nNext:")?;
            writeln!(out, "  -  Let an MDM vendor sign {}; Apple takes no other request.", csr.display())?;
            writeln!(
                out,
                "     If your organization has Apple's MDM vendor certificate, run this again with --vendor-certificate and --vendor-key."
            )?;
            writeln!(out, "     Else send the file to a vendor that signs for others, and take what comes back to the next step.")?;
            next_steps(&mut out, Path::new("the vendor's file"), &key)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn next_steps(out: &mut std::io::Stdout, signed: &Path, key: &Path) -> std::io::Result<()> {
    writeln!(out, "  1. Sign in at https://identity.apple.com/pushcert, with an Apple account of the organization, not of a person who may leave.")?;
    writeln!(
        out,
        "  2. The first time `Create a Certificate`. To renew: `Renew` beside the certificate in use (`wasmdm push-certificate list` shows its"
    )?;
    writeln!(out, "     topic); a certificate that is created anew is of another topic, and no enrolled device can be woken with it.")?;
    writeln!(out, "  3. Upload {}, and download the certificate.", signed.display())?;
    writeln!(out, "  4. wasmdm push-certificate import MDM_certificate.pem --key {}", key.display())
}

/// The vendor's certificates and key, as PEM.
struct VendorFiles {
    chain: String,
    key: String,
    password: Option<String>,
}

impl VendorFiles {
    fn read(options: &RequestOptions) -> anyhow::Result<Option<Self>> {
        if options.vendor_certificates.is_empty() {
            return Ok(None);
        }
        let password = password("vendor-password-file", options.vendor_password_file.as_deref(), "WASMDM_VENDOR_PASSWORD")?;
        let mut chain = String::new();
        for path in &options.vendor_certificates {
            chain += &vendor_file(&read("vendor-certificate", path)?, password.as_deref())?;
            chain.push('\n');
        }
        let key = match &options.vendor_key {
            Some(path) => vendor_file(&read("vendor-key", path)?, password.as_deref())?,
            None => chain.clone(),
        };
        Ok(Some(Self { chain, key, password }))
    }

    fn sign(&self, request: &[u8]) -> anyhow::Result<String> {
        let vendor = Vendor { chain_pem: self.chain.as_bytes(), private_key_pem: self.key.as_bytes(), password: self.password.as_deref() };
        Ok(vendor_signed(request, &vendor)?)
    }
}

/// For its owner only, complete or not there, and never in place of another.
fn keep_key(path: &Path, pem: &str) -> anyhow::Result<()> {
    let unwritable = || format!("key: {} cannot be written", path.display());
    let unfinished = path.with_extension("new");
    // What a run before left unfinished is of no use.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(unwritable),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).with_context(unwritable)?;
    file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).with_context(unwritable)?;
    // A rename would replace what has come there meanwhile.
    fs::hard_link(&unfinished, path).with_context(unwritable)?;
    fs::remove_file(&unfinished).with_context(unwritable)
}

/// Requests are no secret, and follow from the key.
fn replace(path: &Path, content: &str) -> anyhow::Result<()> {
    fs::write(path, content).with_context(|| format!("dir: {} cannot be written", path.display()))
}
