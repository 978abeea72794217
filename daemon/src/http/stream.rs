//! Bodies that come or go piece by piece, joined to code that reads and writes as files are.

use std::io::{self, Read, Write};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use futures::TryStreamExt as _;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Pieces on the way to a client that is slower.
const PIECES_AHEAD: usize = 16;
const PIECE_LEN: usize = 64 << 10;

/// What is read of a body that nobody wants any more.
const UNWANTED_LEN_MAX: u64 = 1 << 30;

/// Reads a request's body on a thread that may wait. What is left of it after an error is read, too:
/// clients hear no answer before they have sent all.
pub(super) fn read_body<T: Send + 'static>(
    body: Body,
    read: impl FnOnce(&mut dyn Read) -> T + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    let stream = body.into_data_stream().map_err(io::Error::other);
    let mut reader = tokio_util::io::SyncIoBridge::new(tokio_util::io::StreamReader::new(stream));
    tokio::task::spawn_blocking(move || {
        let result = read(&mut reader);
        // A client that is gone sends no more.
        drop(io::copy(&mut reader.take(UNWANTED_LEN_MAX), &mut io::sink()));
        result
    })
}

/// A response's body, written by a thread that may wait; fails once the client is gone.
pub(super) struct BodyWriter {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl BodyWriter {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.buffer);
        self.pieces.blocking_send(Ok(piece.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for BodyWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE_LEN {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// A response of type `kind` that `write` writes on a thread of its own. An error after the beginning
/// cuts the body short, which clients see.
pub(super) fn written(
    kind: &'static str,
    write: impl FnOnce(&mut BodyWriter) -> io::Result<()> + Send + 'static,
) -> Response {
    let (pieces, stream) = mpsc::channel(PIECES_AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut writer = BodyWriter { pieces: pieces.clone(), buffer: Vec::new() };
        if let Err(error) = write(&mut writer).and_then(|()| writer.flush()) {
            // A client that is gone needs no answer.
            drop(pieces.blocking_send(Err(error)));
        }
    });
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(ReceiverStream::new(stream))).into_response()
}

/// A response of JSON values, one a line, as they come.
pub(super) fn json_lines(values: mpsc::Receiver<Value>) -> Response {
    let body = ReceiverStream::new(values).map(|value| Ok::<_, std::convert::Infallible>(format!("{value}\r\n")));
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(body)).into_response()
}

/// An error within such a response.
pub(super) fn json_error(message: &str) -> Value {
    serde_json::json!({"error": message, "errorDetail": {"message": message}})
}
