//! The encoding inside Skep, on disk, in raft entries and in messages between nodes: one byte of
//! format version, then bincode 2 with a fixed configuration (little endian, variable integers).
//!
//! Types may get fields without a new format (see [`extensible`]); one that is read in another way
//! than before takes a new format, and a reader that meets another than its own says so instead
//! of guessing.

pub mod extensible;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};

/// The version this build writes and reads. Format 1, of builds before the first release, had no
/// frames around fields.
pub const FORMAT_VERSION: u8 = 2;

/// The largest value that is decoded, in bytes: no foreign length makes us allocate more.
pub const DECODED_LEN_MAX: usize = 64 << 20;

const CONFIG: Configuration<LittleEndian, Varint, Limit<DECODED_LEN_MAX>> =
    bincode::config::standard().with_limit::<DECODED_LEN_MAX>();

/// Why bytes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the data is empty")]
    Empty,
    #[error("the data has format {found}, this version of skep reads {FORMAT_VERSION}: upgrade skep on this node")]
    Newer { found: u8 },
    #[error(
        "the data has format {found} of a build before the first release, this version of skep reads {FORMAT_VERSION}: \
         start with an empty data root"
    )]
    Older { found: u8 },
    #[error("the data is damaged")]
    Damaged(#[source] bincode::error::DecodeError),
    #[error("the data has {0} bytes too many")]
    Trailing(usize),
}

/// Encodes a value.
pub fn encode<T: bincode::Encode>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FORMAT_VERSION];
    bincode::encode_into_std_write(value, &mut bytes, bincode::config::standard())
        .expect("writing to memory does not fail");
    bytes
}

/// Encodes a list item by item: what [`encode`] makes of all of them in a `Vec`.
#[derive(Debug, Default)]
pub struct ListEncoder {
    items: Vec<u8>,
    count: u64,
}

impl ListEncoder {
    pub fn push<T: bincode::Encode>(&mut self, item: &T) {
        bincode::encode_into_std_write(item, &mut self.items, bincode::config::standard())
            .expect("writing to memory does not fail");
        self.count += 1;
    }

    /// How long the items are together.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.items.len()
    }

    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = encode(&self.count);
        bytes.extend_from_slice(&self.items);
        bytes
    }
}

/// Decodes what [`encode`] made.
pub fn decode<T: bincode::Decode<()>>(bytes: &[u8]) -> Result<T, DecodeError> {
    let body = body(bytes)?;
    let (value, len) = bincode::decode_from_slice(body, CONFIG).map_err(DecodeError::Damaged)?;
    whole(value, body.len() - len)
}

/// Encodes a value of a type that has only serde's traits, such as the consensus library's.
pub fn encode_serde<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FORMAT_VERSION];
    bincode::serde::encode_into_std_write(value, &mut bytes, bincode::config::standard())
        .expect("writing to memory does not fail");
    bytes
}

/// Decodes what [`encode_serde`] made.
pub fn decode_serde<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let body = body(bytes)?;
    let (value, len) = bincode::serde::decode_from_slice(body, CONFIG).map_err(DecodeError::Damaged)?;
    whole(value, body.len() - len)
}

fn body(bytes: &[u8]) -> Result<&[u8], DecodeError> {
    match bytes.split_first() {
        None => Err(DecodeError::Empty),
        Some((&FORMAT_VERSION, body)) => Ok(body),
        Some((&found, _)) if found < FORMAT_VERSION => Err(DecodeError::Older { found }),
        Some((&found, _)) => Err(DecodeError::Newer { found }),
    }
}

fn whole<T>(value: T, left: usize) -> Result<T, DecodeError> {
    if left == 0 { Ok(value) } else { Err(DecodeError::Trailing(left)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_format_is_named() {
        let error = decode::<u64>(&[FORMAT_VERSION + 1, 0]).unwrap_err();
        assert!(error.to_string().contains("upgrade skep"), "{error}");
    }

    #[test]
    fn a_list_is_the_same_item_by_item() {
        for count in [0, 1, 250, 251, 70_000] {
            let items: Vec<(u32, String)> = (0..count).map(|n| (n, n.to_string())).collect();
            let mut list = ListEncoder::default();
            items.iter().for_each(|item| list.push(item));
            assert!(list.len_bytes() >= items.len());
            assert!(list.finish() == encode(&items), "{count} items");
        }
    }

    #[test]
    fn cut_or_lengthened_data_is_refused() {
        let mut bytes = encode(&("web".to_owned(), 7u64));
        bytes.push(0);
        assert!(matches!(decode::<(String, u64)>(&bytes), Err(DecodeError::Trailing(1))));
        bytes.truncate(3);
        assert!(matches!(decode::<(String, u64)>(&bytes), Err(DecodeError::Damaged(_))));
        assert!(matches!(decode::<u8>(&[]), Err(DecodeError::Empty)));
    }

    #[test]
    fn a_length_beyond_the_limit_allocates_nothing() {
        let huge = [FORMAT_VERSION, 253, 0, 0, 0, 0, 0, 0, 0, 1];
        assert!(decode::<Vec<u8>>(&huge).is_err());
    }
}
