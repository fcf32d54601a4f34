//! The `Mdm-Signature` header: a detached CMS signature over the request's body.
use crate::certificate::Certificate;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("{0}")]
    Malformed(String),
}
/// `header` is the header's value (base64), `body` the bytes the device signed. Answers the signer's certificate, whose chain is still to be verified.
pub fn verify(_header: &[u8], _body: &[u8]) -> Result<Certificate, SignatureError> {
    todo!()
}
