//! Being attached to a process: its output as it comes, and input for it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::{Container, Engine, EngineError, disk_error};
use crate::container::logs::Stream;
use crate::container::state::ContainerState;
use crate::container::streams::{FrameKind, INPUT_LEN_MAX, frame};
use crate::sys;

/// More in one frame of output is not a frame.
const OUTPUT_LEN_MAX: usize = 1 << 20;

/// A connection to a process's standard streams.
#[derive(Debug)]
pub struct Attachment {
    pub output: OutputReader,
    pub input: InputWriter,
}

impl Attachment {
    pub(super) fn new(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(socket)?.into_split();
        Ok(Self { output: OutputReader(read), input: InputWriter(write) })
    }
}

/// What a process writes.
#[derive(Debug)]
pub struct OutputReader(OwnedReadHalf);

impl OutputReader {
    /// The next piece of output; `None` at its end. A call that is given up may lose some.
    pub async fn next(&mut self) -> Option<(Stream, Vec<u8>)> {
        let mut header = [0; 8];
        self.0.read_exact(&mut header).await.ok()?;
        let [stream, _, _, _, length @ ..] = header;
        let len = u32::from_be_bytes(length) as usize;
        if len > OUTPUT_LEN_MAX {
            return None;
        }
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).await.ok()?;
        Some((if stream == 2 { Stream::Stderr } else { Stream::Stdout }, bytes))
    }
}

/// What a process is given.
#[derive(Debug)]
pub struct InputWriter(OwnedWriteHalf);

impl InputWriter {
    /// Hands input to the process; waits while it does not read.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(INPUT_LEN_MAX) {
            self.0.write_all(&frame(FrameKind::Input, piece)).await?;
        }
        Ok(())
    }

    /// Ends the process's input.
    pub async fn end(&mut self) -> io::Result<()> {
        self.0.write_all(&frame(FrameKind::EndOfInput, &[])).await
    }

    /// Tells the process's terminal how large it is shown.
    pub async fn resize(&mut self, rows: u16, columns: u16) -> io::Result<()> {
        let size = [rows.to_be_bytes(), columns.to_be_bytes()].concat();
        self.0.write_all(&frame(FrameKind::Resize, &size)).await
    }
}

impl Container {
    fn socket(&self) -> std::path::PathBuf {
        self.dirs.run.join("io.sock")
    }

    /// Opens the socket for those who attach to the process that is about to start, and lets those in
    /// who wait already.
    pub(super) fn let_attached_in(&self) -> io::Result<OwnedFd> {
        let (listener, path) = (sys::listen(&self.socket())?, self.socket());
        for waiting in self.waiting.lock().expect("nobody panics while holding it").drain(..) {
            // Who went away meanwhile is not missed.
            drop(waiting.send(attach_at(&path)?));
        }
        Ok(listener.into())
    }
}

pub(super) fn attach_at(path: &Path) -> io::Result<Attachment> {
    Attachment::new(sys::connect(path)?)
}

impl Engine {
    /// Attaches to a container: at once if it runs, else as it starts.
    pub fn attach(&self, name: &str) -> Result<oneshot::Receiver<Attachment>, EngineError> {
        let container = self.find(name)?;
        self.tell_container(&container, "attach", &[]);
        let (ready, attachment) = oneshot::channel();
        let mut waiting = container.waiting.lock().expect("nobody panics while holding it");
        if matches!(*container.state.borrow(), ContainerState::Running(_)) {
            let doing = format!("attaching to container {}", container.id);
            drop(ready.send(attach_at(&container.socket()).map_err(disk_error(doing))?));
        } else {
            waiting.retain(|other| !other.is_closed());
            waiting.push(ready);
        }
        drop(waiting);
        Ok(attachment)
    }

    /// Tells a container's terminal how large it is shown.
    pub async fn resize(&self, name: &str, rows: u16, columns: u16) -> Result<(), EngineError> {
        let container = self.find(name)?;
        container.require_running()?;
        let doing = format!("resizing the terminal of container {}", container.id);
        match attach_at(&container.socket()) {
            Ok(mut attachment) => attachment.input.resize(rows, columns).await.map_err(disk_error(doing))?,
            Err(error) => return Err(disk_error(doing)(error)),
        }
        self.tell_container(&container, "resize", &[("height", rows.to_string()), ("width", columns.to_string())]);
        Ok(())
    }
}
