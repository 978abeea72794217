//! Being attached to a process: its output on ours, our input to it, and our terminal as its own.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Client;

/// What a process is attached by.
pub(crate) struct Streams {
    pub(crate) tty: bool,
    pub(crate) interactive: bool,
    /// Whether its output is shown, and its errors.
    pub(crate) outputs: [bool; 2],
}

/// Our terminal, as it was before; it is put back when this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no care.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// The rows and columns of our window, if the process is to have a terminal (`tty`) as large.
pub(crate) fn window(tty: bool) -> Option<(u16, u16)> {
    if tty { console::Term::stdout().size_checked() } else { None }
}

impl Streams {
    /// With all that it says.
    pub(crate) const fn new(tty: bool, interactive: bool) -> Self {
        Self { tty, interactive, outputs: [true, true] }
    }

    /// Fails early where a terminal is asked for and there is none to give.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let missing = self.tty && self.interactive && !std::io::stdin().is_terminal();
        anyhow::ensure!(!missing, "the input device is not a terminal: leave -t out, or run it in one");
        Ok(())
    }

    /// Copies until the process's output ends. `resize` is where the daemon is told of our window.
    pub(crate) async fn pump(&self, client: &Client, connection: Upgraded, resize: &str) -> anyhow::Result<()> {
        let _raw = (self.tty && self.interactive).then(RawTerminal::enter).transpose()?;
        let (mut from, mut to) = tokio::io::split(TokioIo::new(connection));
        let interactive = self.interactive;
        let input = tokio::spawn(async move {
            let mut stdin = tokio::io::stdin();
            if interactive {
                // The process may end before its input does.
                drop(tokio::io::copy(&mut stdin, &mut to).await);
            }
            drop(to.shutdown().await);
            std::future::pending::<()>().await;
        });
        let resizing = async {
            if !self.tty {
                return std::future::pending().await;
            }
            let Ok(mut changes) = signal(SignalKind::window_change()) else { return std::future::pending().await };
            loop {
                let (rows, columns) = console::Term::stdout().size();
                // It may not have started yet; the next change comes.
                drop(client.post(&format!("{resize}/resize?h={rows}&w={columns}"), &json!({})).await);
                if changes.recv().await.is_none() {
                    return std::future::pending().await;
                }
            }
        };
        let output = async { if self.tty { copy_raw(&mut from).await } else { copy_frames(&mut from).await } };
        let copied = tokio::select! {
            copied = output => copied,
            () = resizing => Ok(()),
        };
        input.abort();
        copied
    }
}

async fn copy_raw(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> anyhow::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let len = from.read(&mut buffer).await?;
        if len == 0 {
            return Ok(());
        }
        let mut out = std::io::stdout();
        out.write_all(&buffer[..len])?;
        out.flush()?;
    }
}

async fn copy_frames(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> anyhow::Result<()> {
    let mut header = [0; 8];
    while from.read_exact(&mut header).await.is_ok() {
        let [stream, _, _, _, len @ ..] = header;
        let mut bytes = vec![0; u32::from_be_bytes(len) as usize];
        from.read_exact(&mut bytes).await?;
        if stream == 2 {
            std::io::stderr().write_all(&bytes)?;
        } else {
            std::io::stdout().write_all(&bytes)?;
            std::io::stdout().flush()?;
        }
    }
    Ok(())
}

/// Signals that ask us to end, or that programs give a meaning of their own, go to the container.
pub(crate) async fn hand_signals_on(client: &Client, container: &str) -> anyhow::Result<()> {
    let kinds = [
        ("INT", SignalKind::interrupt()),
        ("TERM", SignalKind::terminate()),
        ("QUIT", SignalKind::quit()),
        ("HUP", SignalKind::hangup()),
        ("USR1", SignalKind::user_defined1()),
        ("USR2", SignalKind::user_defined2()),
    ];
    let mut signals = Vec::new();
    for (name, kind) in kinds {
        signals.push((name, signal(kind)?));
    }
    loop {
        let next = signals.iter_mut().map(|(name, signal)| {
            let name = *name;
            Box::pin(async move {
                signal.recv().await;
                name
            })
        });
        let (name, ..) = futures::future::select_all(next).await;
        // It may have ended by itself.
        drop(client.post(&format!("{container}/kill?signal={name}"), &json!({})).await);
    }
}

/// A process's exit code as our own.
pub(crate) fn exit_code(code: Option<i64>) -> ExitCode {
    ExitCode::from(u8::try_from(code.unwrap_or(0)).unwrap_or(1))
}
