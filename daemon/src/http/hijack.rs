//! Connections that are taken over from HTTP: a process's streams go over them in both directions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use skep_engine::{Attachment, InputWriter, LogSource};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::daemon::Daemon;
use crate::logs::stream_frame;

/// A frame without content, which clients pass over: only writing tells that one is gone, since they
/// close their own side as soon as they have no input.
const EMPTY_FRAME: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
/// How long nothing is written to a client before it is asked whether it is there.
const QUIET_LIMIT: Duration = Duration::from_secs(5);
/// How long a client is given to listen.
const LISTENING_PAUSE: Duration = Duration::from_millis(20);
const INPUT_LEN: usize = 4096;
const FRAMES_AHEAD: usize = 16;
/// What output is called: of several streams in one, or as it is.
const MULTIPLEXED: HeaderValue = HeaderValue::from_static("application/vnd.docker.multiplexed-stream");
const RAW: HeaderValue = HeaderValue::from_static("application/vnd.docker.raw-stream");

/// What brings the attachment, once the client listens.
pub(super) type Attaching = Pin<Box<dyn Future<Output = Attached> + Send>>;

/// What became of it.
pub(super) enum Attached {
    To(Attachment),
    /// There is nothing to be attached to; what the client is told instead.
    Instead(Bytes),
}

/// What a client takes and gives.
pub(super) struct Streams {
    /// Whether output goes as it is, not in frames.
    pub(super) tty: bool,
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    /// Whether the process's input ends with the client's.
    pub(super) stdin_ends: bool,
    /// What ends the connection but not the process; empty: nothing does.
    pub(super) detach_keys: Vec<u8>,
    /// What is sent before all else.
    pub(super) before: Vec<Bytes>,
}

/// Why a connection was given up.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The process has no more output.
    Output,
    /// The client typed the keys for it.
    Detached,
    /// The client is gone, or the daemon stops.
    Gone,
}

impl Streams {
    /// Takes the connection over, and hands it what comes; `ended` hears why it is over before the
    /// client does.
    pub(super) fn serve<F: Future<Output = ()> + Send>(
        self,
        daemon: Arc<Daemon>,
        request: Request,
        attaching: Attaching,
        ended: impl FnOnce(End) -> F + Send + 'static,
    ) -> Response {
        let kind = if self.tty { RAW } else { MULTIPLEXED };
        if !request.headers().contains_key(header::UPGRADE) {
            return self.stream(attaching, kind, ended);
        }
        let upgraded = hyper::upgrade::on(request);
        tokio::spawn(async move {
            let Ok(upgraded) = upgraded.await else { return };
            let mut client = TokioIo::new(upgraded);
            let attached = tokio::select! {
                () = daemon.stop.cancelled() => return,
                attached = attaching => attached,
            };
            let end = match attached {
                Attached::To(attachment) => tokio::select! {
                    () = daemon.stop.cancelled() => End::Gone,
                    end = self.pump(&mut client, attachment) => end,
                },
                Attached::Instead(told) => {
                    // What comes with the answer's headers is lost on some clients.
                    tokio::time::sleep(LISTENING_PAUSE).await;
                    // A client that is gone need not hear it.
                    drop(client.write_all(&told).await);
                    End::Output
                }
            };
            ended(end).await;
            // The client learns of the end by it.
            drop(client.shutdown().await);
        });
        let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("tcp"));
        headers.insert(header::CONTENT_TYPE, kind);
        response
    }

    /// Output alone, as a response's body: the client cannot give anything.
    fn stream<F: Future<Output = ()> + Send>(
        self,
        attaching: Attaching,
        kind: HeaderValue,
        ended: impl FnOnce(End) -> F + Send + 'static,
    ) -> Response {
        let (frames, stream) = mpsc::channel(FRAMES_AHEAD);
        tokio::spawn(async move {
            let mut attachment = match attaching.await {
                Attached::To(attachment) => attachment,
                Attached::Instead(told) => {
                    drop(frames.send(told).await);
                    ended(End::Output).await;
                    return;
                }
            };
            if self.stdin_ends {
                // A client that gives nothing has given all.
                drop(attachment.input.end().await);
            }
            for frame in &self.before {
                if frames.send(frame.clone()).await.is_err() {
                    return;
                }
            }
            while let Some((source, bytes)) = attachment.output.next().await {
                if let Some(frame) = self.outgoing(source, bytes)
                    && frames.send(frame).await.is_err()
                {
                    return;
                }
            }
            ended(End::Output).await;
        });
        let body = ReceiverStream::new(stream).map(Ok::<_, std::convert::Infallible>);
        let mut response = Response::new(Body::from_stream(body));
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    /// A piece of output as the client takes it, if it does.
    fn outgoing(&self, source: LogSource, bytes: Vec<u8>) -> Option<Bytes> {
        let wanted = match source {
            LogSource::Stdout => self.stdout,
            LogSource::Stderr => self.stderr,
        };
        wanted.then(|| if self.tty { bytes.into() } else { stream_frame(source, &bytes) })
    }

    async fn pump<C: AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static>(
        &self,
        client: &mut C,
        attachment: Attachment,
    ) -> End {
        let (from_client, mut to_client) = tokio::io::split(client);
        let Attachment { mut output, input } = attachment;
        for frame in &self.before {
            if to_client.write_all(frame).await.is_err() {
                return End::Gone;
            }
        }
        let outgoing = async {
            // A read that is given up would lose its place in the stream: it goes on in a task.
            let (frames, mut coming) = mpsc::channel(1);
            let reader = tokio::spawn(async move {
                while let Some(frame) = output.next().await {
                    if frames.send(frame).await.is_err() {
                        return;
                    }
                }
            });
            let _stop = reader.abort_handle();
            let end = loop {
                let frame = match tokio::time::timeout(QUIET_LIMIT, coming.recv()).await {
                    Ok(Some((source, bytes))) => match self.outgoing(source, bytes) {
                        Some(frame) => frame,
                        None => continue,
                    },
                    Ok(None) => break End::Output,
                    // On a terminal every byte would be seen.
                    Err(_) if self.tty => continue,
                    Err(_) => Bytes::from_static(&EMPTY_FRAME),
                };
                if to_client.write_all(&frame).await.is_err() {
                    break End::Gone;
                }
            };
            reader.abort();
            end
        };
        tokio::select! {
            end = outgoing => end,
            end = self.feed(from_client, input) => end,
        }
    }

    /// Brings the client's input to the process; returns once there is no use in the connection.
    async fn feed(&self, mut client: impl AsyncRead + Unpin, mut input: InputWriter) -> End {
        let mut keys = DetachKeys::new(&self.detach_keys);
        let mut buffer = vec![0; INPUT_LEN];
        loop {
            match client.read(&mut buffer).await {
                Ok(0) => break,
                Ok(len) if self.stdin => {
                    let (bytes, detach) = keys.pass(&buffer[..len]);
                    if input.send(&bytes).await.is_err() {
                        break;
                    }
                    if detach {
                        return End::Detached;
                    }
                }
                // Nobody asked for it.
                Ok(_) => {}
                Err(_) => return End::Gone,
            }
        }
        if self.stdin && self.tty {
            // Whoever types no more has left the terminal; on a quiet one nothing else would tell.
            return End::Gone;
        }
        if self.stdin && self.stdin_ends {
            // It may have ended meanwhile.
            drop(input.end().await);
        }
        // A client without input closes its side at once, and goes on reading.
        std::future::pending().await
    }
}

/// Looks for the keys that detach among what is typed.
struct DetachKeys<'a> {
    keys: &'a [u8],
    matched: usize,
}

impl<'a> DetachKeys<'a> {
    fn new(keys: &'a [u8]) -> Self {
        Self { keys, matched: 0 }
    }

    /// What goes on to the process, and whether the keys are complete. The first keys are held back
    /// until it is known that others follow.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len());
        if self.keys.is_empty() {
            return (typed.to_vec(), false);
        }
        for &byte in typed {
            if byte == self.keys[self.matched] {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return (out, true);
                }
                continue;
            }
            out.extend_from_slice(&self.keys[..self.matched]);
            self.matched = usize::from(byte == self.keys[0]);
            if self.matched == 0 {
                out.push(byte);
            }
        }
        (out, false)
    }
}

/// Reads keys as users write them: `ctrl-p,ctrl-q`, `a`.
pub(super) fn parse_detach_keys(text: &str) -> Option<Vec<u8>> {
    let key = |name: &str| match name.as_bytes() {
        &[byte] => Some(byte),
        [b'c', b't', b'r', b'l', b'-', letter] => match letter {
            b'a'..=b'z' => Some(letter - b'a' + 1),
            b'@' => Some(0),
            b'[' => Some(27),
            b'\\' => Some(28),
            b']' => Some(29),
            b'^' => Some(30),
            b'_' => Some(31),
            _ => None,
        },
        _ => None,
    };
    let text = if text.is_empty() { "ctrl-p,ctrl-q" } else { text };
    text.split(',').map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_detach_and_all_else_is_passed_on() {
        assert_eq!(parse_detach_keys("").unwrap(), [16, 17]);
        assert_eq!(parse_detach_keys("a,ctrl-@").unwrap(), [b'a', 0]);
        assert!(parse_detach_keys("ctrl-p,shift-q").is_none());
        let mut keys = DetachKeys::new(&[16, 17]);
        assert_eq!(keys.pass(b"ab"), (b"ab".to_vec(), false));
        assert_eq!(keys.pass(&[b'c', 16]), (b"c".to_vec(), false));
        assert_eq!(keys.pass(b"d"), (vec![16, b'd'], false));
        assert_eq!(keys.pass(&[16, 16, 17, b'x']), (vec![16], true));
        assert_eq!(DetachKeys::new(&[]).pass(&[16, 17]), (vec![16, 17], false));
    }
}
