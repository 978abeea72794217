//! Ids: 128 random bits, written as 25 characters of base 36, as Swarm does.
//!
//! Each kind of object has its own type, so that a task's id cannot be taken for a node's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Length of an id's text form.
pub const ID_CHARS: usize = 25;

const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: 25 characters of 0-9 and a-z are wanted")]
pub struct ParseIdError(pub String);

/// Writes `value` in base 36, most significant digit first, padded to 25 characters.
fn to_base36(mut value: u128) -> [u8; ID_CHARS] {
    let mut text = [b'0'; ID_CHARS];
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[(value % 36) as usize];
        value /= 36;
    }
    text
}

fn from_base36(text: &str) -> Option<u128> {
    if text.len() != ID_CHARS {
        return None;
    }
    text.bytes().try_fold(0u128, |value, byte| {
        let digit = DIGITS.iter().position(|&d| d == byte)?;
        value.checked_mul(36)?.checked_add(digit as u128)
    })
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode)]
        pub struct $name(u128);

        impl $name {
            /// A new id from the system's randomness.
            #[must_use]
            pub fn random() -> Self {
                Self(rand::random())
            }

            /// An id from a number: for tests and for reproducible simulations.
            #[must_use]
            pub const fn from_u128(value: u128) -> Self {
                Self(value)
            }

            /// The bytes that [`from_bytes`](Self::from_bytes) takes back.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }

            /// Takes an id from a message; `None` if it has not 16 bytes.
            #[must_use]
            pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(|bytes| Self(u128::from_be_bytes(bytes)))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(std::str::from_utf8(&to_base36(self.0)).map_err(|_| fmt::Error)?)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                from_base36(text).map(Self).ok_or_else(|| ParseIdError(text.to_owned()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

ids! {
    /// Names a swarm; the O of its certificates.
    ClusterId,
    /// Names a node; the CN of its certificate.
    NodeId,
    /// Names a service for its whole life, whatever it is renamed to.
    ServiceId,
    /// Names one run of one container; never used twice.
    TaskId,
    /// Names a secret.
    SecretId,
    /// Names a config.
    ConfigId,
    /// Names a network.
    NetworkId,
    /// Names a single container's place in a network.
    AttachmentId,
    /// Names a volume of the swarm.
    VolumeId,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_reads_back_as_it_was_written(value: u128) {
            let id = NodeId::from_u128(value);
            prop_assert_eq!(id.to_string().len(), ID_CHARS);
            prop_assert_eq!(id.to_string().parse::<NodeId>(), Ok(id));
            prop_assert_eq!(NodeId::from_bytes(&id.to_bytes()), Some(id));
        }
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "abc", "0123456789012345678901234A", "zzzzzzzzzzzzzzzzzzzzzzzzz"] {
            assert!(text.parse::<TaskId>().is_err(), "{text:?}");
        }
    }
}
