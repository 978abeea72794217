//! Bodies that are never held whole: of requests, made while they are sent, and of answers, read while they come.

use std::io::{self, BufWriter, Read, Write};

use bytes::{Buf as _, Bytes};
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::Response;
use hyper::body::{Frame, Incoming};
use tokio::sync::mpsc;

/// A piece's length in bytes, and how many wait at most.
const PIECE_LEN: usize = 128 << 10;
const PIECES_MAX: usize = 4;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A body that is there already.
pub(crate) fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// What `write` writes. It has a thread of its own, which nobody waits for; an error of its own ends the request.
pub(crate) fn written(write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()> + Send + 'static) -> Body {
    let (pieces, taken) = mpsc::channel(PIECES_MAX);
    std::thread::spawn(move || {
        let mut pipe = BufWriter::with_capacity(PIECE_LEN, Pieces(pieces.clone()));
        if let Err(error) = write(&mut pipe).and_then(|()| Ok(pipe.flush()?)) {
            // Who has gone need not know.
            drop(pieces.blocking_send(Err(io::Error::other(error))));
        }
    });
    let pieces = stream::unfold(taken, |mut taken: mpsc::Receiver<io::Result<Bytes>>| async {
        let piece = taken.recv().await?;
        Some((piece.map(Frame::data), taken))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// Reads an answer by what waits for its input.
pub(crate) async fn read_by<T: Send + 'static>(
    answer: Response<Incoming>,
    read: impl FnOnce(&mut dyn Read) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (pieces, taken) = mpsc::channel(PIECES_MAX);
    let reading = tokio::task::spawn_blocking(move || read(&mut Taken { taken, piece: Bytes::new() }));
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data()
            && pieces.send(data).await.is_err()
        {
            // It has read enough, or failed.
            break;
        }
    }
    drop(pieces);
    reading.await?
}

struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Taken {
    taken: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Taken {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while !self.piece.has_remaining() {
            match self.taken.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let len = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_what_was_written_or_why_it_could_not_be() {
        let long: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let wanted = long.clone();
        let body = written(move |to| Ok(to.write_all(&long)?));
        assert_eq!(body.collect().await.unwrap().to_bytes(), wanted);
        let body = written(|to| {
            to.write_all(b"half")?;
            anyhow::bail!("the disk is gone")
        });
        assert!(body.collect().await.unwrap_err().to_string().contains("the disk is gone"));
    }
}
