//! Activation Lock is taken off at Apple with the key that the organization escrowed: the one call of NanoMDM's API that reaches out to
//! Apple with a push certificate.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use reqwest::{Identity, Url};
use tokio::sync::Semaphore;
use wasmdm_storage::push_certificates::PushCertificate;

use crate::outward;

/// Apple's.
pub const DEFAULT_URL: &str = "https://deviceservices-external.apple.com/deviceservicesworkers/escrowKeyUnlock";
/// The whole exchange.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Apple answers in a sentence.
const LONGEST_ANSWER: usize = 1 << 20;
/// Calls at once; each makes a client of its own, with the certificate of its topic.
const AT_ONCE: usize = 8;

/// Which device, and by which right. Not printable: it holds the key.
pub struct UnlockRequest {
    pub serial: String,
    pub product_type: String,
    /// A secret.
    pub escrow_key: String,
    pub org_name: String,
    pub guid: String,
    pub imei: Option<String>,
    pub imei2: Option<String>,
    pub meid: Option<String>,
}

/// What Apple said.
#[derive(Debug)]
pub struct UnlockAnswer {
    pub status: StatusCode,
    /// Without those of the connection.
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Why Apple was not asked, or not heard.
#[derive(Debug, thiserror::Error)]
pub enum UnlockError {
    #[error("too many calls wait for Apple")]
    Busy,
    #[error("the push certificate of the topic cannot be used as a client's: {0}")]
    Certificate(String),
    #[error("Apple was not reached: {0}")]
    Unreached(String),
}

/// The caller of Apple.
#[derive(Debug)]
pub struct EscrowKeyUnlock {
    url: Url,
    places: Semaphore,
}

impl EscrowKeyUnlock {
    /// A caller of that address.
    pub fn new(url: Url) -> Self {
        Self { url, places: Semaphore::new(AT_ONCE) }
    }

    /// Asks once; Apple's answer is passed on as it is.
    pub async fn unlock(&self, certificate: &PushCertificate, asked: &UnlockRequest) -> Result<UnlockAnswer, UnlockError> {
        let _place = self.places.try_acquire().map_err(|_| UnlockError::Busy)?;
        let pem = format!("{}\n{}", certificate.certificate_pem, certificate.private_key_pem);
        let http = Identity::from_pem(pem.as_bytes()).and_then(|identity| outward::client_with_identity(TIMEOUT, identity));
        let http = http.map_err(|error| UnlockError::Certificate(error.to_string()))?;
        let mut url = self.url.clone();
        {
            let mut query = url.query_pairs_mut();
            query.append_pair("productType", &asked.product_type).append_pair("serial", &asked.serial);
            for (name, value) in [("imei", &asked.imei), ("imei2", &asked.imei2), ("meid", &asked.meid)] {
                if let Some(value) = value {
                    query.append_pair(name, value);
                }
            }
        }
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("escrowKey", &asked.escrow_key)
            .append_pair("guid", &asked.guid)
            .append_pair("orgName", &asked.org_name)
            .finish();
        let request = http.post(url).header(header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(form);
        let mut response = request.send().await.map_err(unreached)?;
        let (status, headers) = (response.status(), outward::end_to_end(response.headers()));
        let mut body = BytesMut::new();
        while let Some(chunk) = response.chunk().await.map_err(unreached)? {
            if body.len().saturating_add(chunk.len()) > LONGEST_ANSWER {
                return Err(UnlockError::Unreached(format!("the answer is longer than {LONGEST_ANSWER} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(UnlockAnswer { status, headers, body: body.freeze() })
    }
}

/// With the causes, which say what is wrong with a certificate; without the URL, which names the device.
fn unreached(error: reqwest::Error) -> UnlockError {
    UnlockError::Unreached(format!("{:#}", anyhow::Error::from(error.without_url())))
}
