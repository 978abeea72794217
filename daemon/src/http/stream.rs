//! Bodies that come or go piece by piece, joined to code that reads and writes as files are.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures::{Stream, TryStreamExt as _};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Pieces on the way to a client that is slower.
const PIECES_AHEAD: usize = 16;
const PIECE_LEN: usize = 64 << 10;

/// What is read of a body that nobody wants any more, and for how long.
const UNWANTED_LEN_MAX: usize = 1 << 30;
const UNWANTED_TIME_MAX: Duration = Duration::from_secs(10);

/// A request's body that comes back to where it was given out when it is dropped before its end.
struct Returning {
    pieces: BodyDataStream,
    rest: Option<oneshot::Sender<BodyDataStream>>,
}

impl Stream for Returning {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.pieces).poll_next(context);
        if !matches!(next, Poll::Pending | Poll::Ready(Some(Ok(_)))) {
            self.rest = None;
        }
        next
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        if let Some(rest) = self.rest.take() {
            let pieces = std::mem::replace(&mut self.pieces, Body::empty().into_data_stream());
            // Nobody waits for it where the answer is on its way already.
            drop(rest.send(pieces));
        }
    }
}

/// Reads what an answer leaves of its request's body before it is sent: clients that are still sending
/// hear no answer, and a connection closed under them is all they would see.
pub(super) async fn read_to_the_end(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (sender, mut rest) = oneshot::channel();
    let body = |body: Body| Body::from_stream(Returning { pieces: body.into_data_stream(), rest: Some(sender) });
    let response = next.run(request.map(body)).await;
    if let Ok(mut unwanted) = rest.try_recv() {
        let mut len = 0;
        let reading = async {
            while len < UNWANTED_LEN_MAX
                && let Some(Ok(piece)) = unwanted.next().await
            {
                len += piece.len();
            }
        };
        // Who sends more, or slowly, is cut off.
        drop(tokio::time::timeout(UNWANTED_TIME_MAX, reading).await);
    }
    response
}

/// Reads a request's body on a thread that may wait.
pub(super) fn read_body<T: Send + 'static>(
    body: Body,
    read: impl FnOnce(&mut dyn Read) -> T + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    let stream = body.into_data_stream().map_err(io::Error::other);
    let mut reader = tokio_util::io::SyncIoBridge::new(tokio_util::io::StreamReader::new(stream));
    tokio::task::spawn_blocking(move || read(&mut reader))
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

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::put;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    async fn answer(client: &mut TcpStream) -> String {
        let mut answer = Vec::new();
        while !answer.ends_with(b"later") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn who_is_refused_may_send_all_before_hearing_of_it() {
        let refuse = put(|| async { (StatusCode::FORBIDDEN, "later") });
        let router = Router::new().route("/", refuse).layer(axum::middleware::from_fn(read_to_the_end));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        tokio::spawn(async { axum::serve(listener, router).await });
        // The second would not be answered had the connection been closed at the first.
        for _ in 0..2 {
            client.write_all(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n").await.unwrap();
            let early = tokio::time::timeout(Duration::from_millis(100), client.peek(&mut [0])).await;
            assert!(early.is_err(), "the answer came before all was sent");
            client.write_all(&vec![0; 1_000_000]).await.unwrap();
            assert!(answer(&mut client).await.starts_with("HTTP/1.1 403 Forbidden"));
        }
    }
}
