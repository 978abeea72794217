//! What `#[derive(Extensible)]` makes of fields with names: the length of all of them in bytes,
//! then each in its order.
//!
//! A build that knows fewer of them passes over the rest; a build that knows more takes the
//! default of what is missing. So nodes of neighbouring versions read each other's messages, and
//! an upgrade reads the store it finds.

use std::cell::RefCell;
use std::fmt;

use bincode::config::Config;
use bincode::de::read::{Reader, SliceReader};
use bincode::de::{Decoder, DecoderImpl};
use bincode::enc::write::Writer;
use bincode::enc::{Encoder, EncoderImpl};
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

/// What a frame's fields are written into.
type FrameEncoder<C> = EncoderImpl<Bytes, C>;

/// Bytes in memory.
#[derive(Debug, Default)]
pub struct Bytes(Vec<u8>);

impl Writer for Bytes {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// A buffer that is larger is given back.
const SPARE_LEN_MAX: usize = 64 << 10;

thread_local! {
    /// Buffers of frames that are written, one for each that was within another: a value has many frames.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Writes fields with their length before them.
///
/// # Errors
///
/// What a field's encoding says.
pub fn encode_frame<E: Encoder>(
    encoder: &mut E,
    fields: impl FnOnce(&mut FrameEncoder<E::C>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let spare = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    let mut frame = EncoderImpl::new(Bytes(spare), *encoder.config());
    fields(&mut frame)?;
    let Bytes(mut bytes) = frame.into_writer();
    (bytes.len() as u64).encode(encoder)?;
    encoder.writer().write(&bytes)?;
    if bytes.capacity() <= SPARE_LEN_MAX {
        bytes.clear();
        SPARE.with_borrow_mut(|spare| spare.push(bytes));
    }
    Ok(())
}

/// Reads fields from what [`encode_frame`] wrote.
///
/// # Errors
///
/// The frame ends after the data or within a field, or a field is damaged.
pub fn decode_frame<D: Decoder<Context = ()>, T>(
    decoder: &mut D,
    fields: impl FnOnce(&mut Frame<'_, D::C>) -> Result<T, DecodeError>,
) -> Result<T, DecodeError> {
    let len = u64::decode(decoder)?;
    let len = usize::try_from(len).map_err(|_| DecodeError::OutsideUsizeRange(len))?;
    decoder.claim_bytes_read(len)?;
    let config = *decoder.config();
    let reader = decoder.reader();
    let bytes = reader.peek_read(len).ok_or(DecodeError::UnexpectedEnd { additional: len })?;
    let value = fields(&mut Frame { decoder: DecoderImpl::new(SliceReader::new(bytes), config, ()) })?;
    reader.consume(len);
    Ok(value)
}

/// The fields that were not read yet.
pub struct Frame<'a, C: Config> {
    decoder: DecoderImpl<SliceReader<'a>, C, ()>,
}

impl<C: Config> Frame<'_, C> {
    /// A field that is always there.
    ///
    /// # Errors
    ///
    /// It is not, or is damaged.
    pub fn field<T: Decode<()>>(&mut self) -> Result<T, DecodeError> {
        T::decode(&mut self.decoder)
    }

    /// A field that earlier builds did not write.
    ///
    /// # Errors
    ///
    /// It is there and damaged.
    pub fn added<T: Decode<()> + Default>(&mut self) -> Result<T, DecodeError> {
        if self.decoder.reader().peek_read(1).is_some() { self.field() } else { Ok(T::default()) }
    }
}

impl<C: Config> fmt::Debug for Frame<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame").finish_non_exhaustive()
    }
}

/// What is said of an enum's variant that this build does not know.
#[must_use]
pub fn unknown_variant(name: &str, found: u32) -> DecodeError {
    DecodeError::OtherString(format!(
        "{name} has no variant {found} in this version of skep: upgrade skep on this node"
    ))
}

#[cfg(test)]
mod tests {
    use crate::Extensible;
    use crate::encoding::{decode, encode};

    #[derive(Debug, PartialEq, Extensible)]
    struct Earlier {
        name: String,
    }

    #[derive(Debug, PartialEq, Extensible)]
    struct Later {
        name: String,
        #[added]
        labels: Vec<String>,
        #[added]
        limit: Option<u64>,
    }

    #[derive(Debug, PartialEq, Extensible)]
    enum EarlierAction {
        Stop,
        Set { value: u8 },
    }

    #[derive(Debug, PartialEq, Extensible)]
    enum LaterAction {
        Stop,
        Set {
            value: u8,
            #[added]
            forced: bool,
        },
        Name(String),
    }

    fn earlier(name: &str) -> Earlier {
        Earlier { name: name.into() }
    }

    fn later(name: &str) -> Later {
        Later { name: name.into(), labels: vec!["a".into()], limit: Some(3) }
    }

    #[test]
    fn a_field_that_was_not_written_takes_its_default() {
        let read: Vec<Later> = decode(&encode(&vec![earlier("web"), earlier("db")])).unwrap();
        let unset = |name: &str| Later { labels: vec![], limit: None, ..later(name) };
        assert_eq!(read, [unset("web"), unset("db")]);
        let read: Vec<LaterAction> =
            decode(&encode(&vec![EarlierAction::Set { value: 7 }, EarlierAction::Stop])).unwrap();
        assert_eq!(read, [LaterAction::Set { value: 7, forced: false }, LaterAction::Stop]);
    }

    #[test]
    fn a_field_that_is_not_known_is_passed_over() {
        let read: Vec<Earlier> = decode(&encode(&vec![later("web"), later("db")])).unwrap();
        assert_eq!(read, [earlier("web"), earlier("db")]);
        let actions = vec![LaterAction::Set { value: 7, forced: true }, LaterAction::Stop];
        let read: Vec<EarlierAction> = decode(&encode(&actions)).unwrap();
        assert_eq!(read, [EarlierAction::Set { value: 7 }, EarlierAction::Stop]);
    }

    #[test]
    fn an_unknown_variant_is_named_with_the_way_out() {
        let error = decode::<EarlierAction>(&encode(&LaterAction::Name("x".into()))).unwrap_err();
        let error = crate::with_causes(&error);
        assert!(error.contains("EarlierAction has no variant 2") && error.contains("upgrade skep"), "{error}");
    }

    #[test]
    fn a_frame_beyond_the_data_or_its_fields_is_refused() {
        let mut bytes = encode(&earlier("web"));
        bytes[1] += 1;
        assert!(decode::<Earlier>(&bytes).is_err(), "it is longer than the data");
        bytes[1] -= 2;
        assert!(decode::<Earlier>(&bytes).is_err(), "it ends within a field");
        let empty = [crate::encoding::FORMAT_VERSION, 0];
        assert!(decode::<Earlier>(&empty).is_err(), "the first field is always there");
    }
}
