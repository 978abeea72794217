//! Join tokens: `SWMTKN-1-<digest of the root CA, 50 chars>-<16-byte secret, 25 chars>`, base 36.

use std::fmt;
use std::str::FromStr;

use num_bigint::BigUint;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::ca::CaDigest;

/// What lets a node in, and tells it which CA to trust.
#[derive(Clone)]
pub struct JoinToken {
    digest: CaDigest,
    secret: Zeroizing<[u8; 16]>,
}

/// Why a text is no join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    #[error("invalid join token: it should read SWMTKN-1-…-…; get it from 'swarm join-token' on a manager")]
    Malformed,
    #[error("join tokens of version {0} are not supported: this swarm makes version 1")]
    Version(String),
}

const DIGEST_CHARS: usize = 50;
const SECRET_CHARS: usize = 25;

impl JoinToken {
    /// A new token for the swarm whose root has `digest`.
    #[must_use]
    pub fn generate(digest: CaDigest) -> Self {
        Self { digest, secret: Zeroizing::new(rand::random()) }
    }

    #[must_use]
    pub const fn ca_digest(&self) -> CaDigest {
        self.digest
    }

    /// Whether both are the same token; takes as long whatever they hold.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        (self.secret.as_slice().ct_eq(other.secret.as_slice()) & self.digest.0.ct_eq(&other.digest.0)).into()
    }

    /// The token as its user sees it.
    #[must_use]
    pub fn expose(&self) -> String {
        let secret = BigUint::from_bytes_be(self.secret.as_slice()).to_str_radix(36);
        format!("SWMTKN-1-{}-{secret:0>25}", self.digest)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, [secret])", self.digest)
    }
}

fn decode<const N: usize>(text: &str, chars: usize) -> Option<[u8; N]> {
    if text.len() != chars || text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let bytes = BigUint::parse_bytes(text.as_bytes(), 36)?.to_bytes_be();
    let mut padded = [0; N];
    padded.get_mut(N.checked_sub(bytes.len())?..)?.copy_from_slice(&bytes);
    Some(padded)
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let parts: Vec<&str> = text.trim().split('-').collect();
        match parts.as_slice() {
            ["SWMTKN", "1", digest, secret] => {
                let digest = decode(digest, DIGEST_CHARS).ok_or(JoinTokenError::Malformed)?;
                let secret = decode(secret, SECRET_CHARS).ok_or(JoinTokenError::Malformed)?;
                Ok(Self { digest: CaDigest(digest), secret: Zeroizing::new(secret) })
            }
            ["SWMTKN", version, ..] if *version != "1" => Err(JoinTokenError::Version((*version).to_owned())),
            _ => Err(JoinTokenError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_has_docker_s_shape() {
        for _ in 0..100 {
            let token = JoinToken::generate(CaDigest(rand::random()));
            let text = token.expose();
            let lens: Vec<_> = text.split('-').map(str::len).collect();
            assert_eq!(lens, [6, 1, 50, 25], "{text}");
            assert!(text.parse::<JoinToken>().unwrap().matches(&token));
            assert!(!JoinToken::generate(token.digest).matches(&token));
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "SWMTKN-1-abc-def", "SWMTKN-1", "hello", &"SWMTKN-1-".repeat(20)] {
            assert_eq!(text.parse::<JoinToken>().unwrap_err(), JoinTokenError::Malformed, "{text}");
        }
        let high = format!("SWMTKN-1-{}-{}", "z".repeat(50), "z".repeat(25));
        assert_eq!(high.parse::<JoinToken>().unwrap_err(), JoinTokenError::Malformed);
        assert!(matches!("SWMTKN-2-1-a-b".parse::<JoinToken>(), Err(JoinTokenError::Version(_))));
    }
}
