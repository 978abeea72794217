//! The session of a worker with the leader: messages of `proto/swarm.proto` on a TLS connection of
//! their own, each behind its length. Many workers hold one for long, so that it must be small.

use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::StreamExt as _;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio_util::codec::{Decoder, FramedRead};

/// Tells a session from gRPC, which comes in by the same port.
pub const ALPN: &[u8] = b"skep-session/1";
/// The largest message that is taken, in bytes.
pub const MESSAGE_LEN_MAX: usize = 64 << 20;
/// One who hears nothing for this long asks whether the other is there.
pub const SILENCE: Duration = Duration::from_secs(1);
/// How long an answer to that may take: soon enough for a worker to find a new leader before that
/// gives it up.
pub const ANSWER_LIMIT: Duration = Duration::from_millis(1500);
/// How long the other may take none of a message.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// What most messages fit into, in bytes.
const USUAL_LEN: usize = 256;
const PREFIX_LEN: usize = size_of::<u32>();

/// What a session runs on.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<C: AsyncRead + AsyncWrite + Send + Unpin> Connection for C {}

/// The two directions of a connection, with messages of type `In` coming in.
pub fn split<C: Connection, In: Message + Default>(connection: C) -> (Incoming<C, In>, Outgoing<C>) {
    let (read, write) = tokio::io::split(connection);
    (Incoming(FramedRead::with_capacity(read, Messages(PhantomData), USUAL_LEN)), Outgoing(write))
}

/// Messages of the other side.
#[derive(Debug)]
pub struct Incoming<C, M>(FramedRead<ReadHalf<C>, Messages<M>>);

impl<C: Connection, M: Message + Default> Incoming<C, M> {
    /// The next message; none once the other side has gone. Whoever stops waiting loses nothing.
    pub async fn next(&mut self) -> io::Result<Option<M>> {
        self.0.next().await.transpose()
    }
}

/// The way to the other side.
#[derive(Debug)]
pub struct Outgoing<C>(WriteHalf<C>);

impl<C: Connection> Outgoing<C> {
    /// Sends a message whole. Whoever stops waiting must send nothing more.
    pub async fn send(&mut self, message: &impl Message) -> io::Result<()> {
        let len = message.encoded_len();
        let prefix = u32::try_from(len).ok().filter(|_| len <= MESSAGE_LEN_MAX).ok_or_else(|| too_long(len))?;
        let mut bytes = Vec::with_capacity(PREFIX_LEN + len);
        bytes.extend(prefix.to_be_bytes());
        message.encode(&mut bytes)?;
        let sent = async {
            self.0.write_all(&bytes).await?;
            self.0.flush().await
        };
        tokio::time::timeout(SEND_LIMIT, sent).await?
    }
}

/// Cuts what comes in into messages.
#[derive(Debug)]
struct Messages<M>(PhantomData<fn() -> M>);

impl<M: Message + Default> Decoder for Messages<M> {
    type Item = M;
    type Error = io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> io::Result<Option<M>> {
        let Some(prefix) = bytes.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).map_err(io::Error::other)?;
        if len > MESSAGE_LEN_MAX {
            return Err(too_long(len));
        }
        // Room is made as it comes: who tells of a long message has not sent it yet.
        if bytes.len() < PREFIX_LEN + len {
            return Ok(None);
        }
        bytes.advance(PREFIX_LEN);
        let message = M::decode(bytes.split_to(len))?;
        if bytes.is_empty() {
            // What a long message took is given back.
            *bytes = BytesMut::with_capacity(USUAL_LEN);
        }
        Ok(Some(message))
    }
}

fn too_long(len: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a message of {len} bytes, of {MESSAGE_LEN_MAX} at most"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::{Redirect, StatusBatch, TaskStatusUpdate};

    #[tokio::test]
    async fn messages_arrive_whole_and_in_order_whatever_their_size() {
        let (one, other) = tokio::io::duplex(100);
        let (_, mut to_other) = split::<_, Redirect>(one);
        let (mut incoming, _) = split::<_, StatusBatch>(other);
        let sizes = [0, 1, 255, 300_000, 3];
        let batch = |len| StatusBatch { updates: vec![TaskStatusUpdate { task_id: vec![7; len], status: vec![] }] };
        let sending = tokio::spawn(async move {
            for len in sizes {
                to_other.send(&batch(len)).await.unwrap();
            }
        });
        for len in sizes {
            assert_eq!(incoming.next().await.unwrap(), Some(batch(len)));
        }
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_message_that_is_cut_off_or_too_long_is_an_error() {
        let mut cut = &[0, 0, 0, 9, 1][..];
        let mut decoder = Messages::<Redirect>(PhantomData);
        assert!(decoder.decode_eof(&mut BytesMut::from(cut)).is_err());
        cut = &[255, 255, 255, 255, 1];
        assert!(decoder.decode(&mut BytesMut::from(cut)).is_err());
        assert!(decoder.decode(&mut BytesMut::from(&[0, 0, 0, 2, 255, 255][..])).is_err(), "no message");
    }
}
