//! Private keys under a password as OpenSSL wrote them before PKCS#8, and MicroMDM's `mdmctl` still does: PEM blocks with the headers
//! `Proc-Type: 4,ENCRYPTED` and `DEK-Info` (RFC 1421). Read only; nobody should write them any more.

use aes::{Aes128, Aes192, Aes256};
use cbc::Decryptor;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockCipher, BlockDecryptMut, KeyInit, KeyIvInit as _, KeySizeUser};
use des::TdesEde3;
use md5::{Digest as _, Md5};
use pem::Pem;

use crate::push_certificate::PushCertificateError;

/// Whether the block is a key of that form.
pub(crate) fn is_old(key: &Pem) -> bool {
    key.headers().get("Proc-Type").is_some_and(|value| value.contains("ENCRYPTED"))
}

/// The key without its password.
pub(crate) fn decrypted(key: &Pem, password: &str) -> Result<Pem, PushCertificateError> {
    let info = key.headers().get("DEK-Info").ok_or(PushCertificateError::UnknownEncryption)?;
    let (algorithm, vector) = info.split_once(',').ok_or(PushCertificateError::UnknownEncryption)?;
    let vector = from_hex(vector.trim()).ok_or(PushCertificateError::UnknownEncryption)?;
    let content = key.contents();
    let plain = match algorithm.trim() {
        "AES-128-CBC" => open::<Aes128>(password, &vector, content),
        "AES-192-CBC" => open::<Aes192>(password, &vector, content),
        "AES-256-CBC" => open::<Aes256>(password, &vector, content),
        "DES-EDE3-CBC" => open::<TdesEde3>(password, &vector, content),
        _ => return Err(PushCertificateError::UnknownEncryption),
    }?;
    // One wrong password in 256 leaves a good padding; a key is a sequence.
    if plain.first() != Some(&0x30) {
        return Err(PushCertificateError::WrongPassword);
    }
    Ok(Pem::new(key.tag(), plain))
}

fn open<C>(password: &str, vector: &[u8], content: &[u8]) -> Result<Vec<u8>, PushCertificateError>
where
    C: BlockDecryptMut + BlockCipher + KeyInit + KeySizeUser,
{
    let salt = vector.get(..8).ok_or(PushCertificateError::UnknownEncryption)?;
    let key = derived(password, salt, C::key_size());
    let cipher = Decryptor::<C>::new_from_slices(&key, vector).map_err(|_| PushCertificateError::UnknownEncryption)?;
    let mut content = content.to_vec();
    let plain = cipher.decrypt_padded_mut::<Pkcs7>(&mut content).map_err(|_| PushCertificateError::WrongPassword)?;
    Ok(plain.to_vec())
}

/// OpenSSL's `EVP_BytesToKey` with MD5, once: each digest continues the one before.
fn derived(password: &str, salt: &[u8], length: usize) -> Vec<u8> {
    let (mut key, mut digest) = (Vec::new(), Vec::new());
    while key.len() < length {
        digest = Md5::new().chain_update(&digest).chain_update(password).chain_update(salt).finalize().to_vec();
        key.extend_from_slice(&digest);
    }
    key.truncate(length);
    key
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    digits?.chunks(2).map(|pair| if let [high, low] = pair { Some(high << 4 | low) } else { None }).collect()
}
