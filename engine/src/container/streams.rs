//! What flows in and out of a process: its output goes to the log and to everybody attached, their
//! input comes to it. Lives in the process that watches it, so that neither the daemon's restart nor
//! its death loses any of it.
//!
//! Those attached connect to a socket. They send frames of a kind, a length and that many bytes;
//! they get frames as the Engine API multiplexes output. Whoever is attached and does not read holds
//! the process up, as a pipe would: nothing is lost, and nothing grows.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use skep_api::Timestamp;

use crate::container::logs::{LogWriter, Stream};
use crate::sys;

/// What someone attached sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// Bytes for the process's standard input.
    Input = 0,
    /// No more input comes, from anybody.
    EndOfInput = 1,
    /// The terminal's new size: rows, then columns, 16 bits each, the higher byte first.
    Resize = 2,
}

/// A frame's kind and the length of what follows.
pub(crate) const FRAME_HEADER_LEN: usize = 5;
/// What one frame of input holds at most.
pub(crate) const INPUT_LEN_MAX: usize = 4096;
const OUTPUT_LEN_MAX: usize = 16 << 10;
/// Once the first process is gone and nothing is written for this long, what others still hold open
/// is let go of.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);
/// How long the end waits for someone attached who takes nothing, though there is room for it.
const CLIENTS_LIMIT: Duration = Duration::from_secs(5);
/// Room in a socket for all that can be left when a process has ended: a full pipe and more.
const LAST_ROOM: usize = 1 << 20;
/// Milliseconds without a word or a visitor after which a watcher may rest.
const QUIET_MILLIS: u16 = 500;
/// More at once are turned away.
const CLIENTS_MAX: usize = 64;

/// A frame as it is sent to the watcher.
pub(crate) fn frame(kind: FrameKind, bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).expect("a frame is short");
    [[kind as u8].as_slice(), &len.to_be_bytes(), bytes].concat()
}

/// Where a process's input and output come from and go to.
pub(crate) struct Endpoints {
    /// For pipes: the two outputs. For a terminal: its other side, alone.
    pub(crate) outputs: [Option<OwnedFd>; 2],
    /// None: it reads from nowhere.
    pub(crate) input: Option<OwnedFd>,
    /// Whether input and output are one terminal.
    pub(crate) terminal: bool,
}

/// Someone who is attached.
struct Client {
    socket: UnixStream,
    /// Of a frame that has not come in whole.
    received: Vec<u8>,
    /// What the socket did not take yet.
    pending: Vec<u8>,
    /// Whether it may still send.
    open: bool,
    gone: bool,
}

/// Copies until the process has ended.
pub(crate) struct Streams {
    endpoints: Endpoints,
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    writer: Option<LogWriter>,
    /// Input that the process did not take yet.
    input: Vec<u8>,
    end_of_input: bool,
}

/// What a descriptor in the poll list is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    End,
    Listener,
    Input,
    Output(usize),
    Client(usize),
}

impl Streams {
    pub(crate) fn new(
        endpoints: Endpoints,
        listener: Option<UnixListener>,
        writer: Option<LogWriter>,
    ) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        for fd in endpoints.input.iter().chain(endpoints.outputs.iter().flatten()) {
            sys::set_nonblocking(fd)?;
        }
        let mut streams =
            Self { endpoints, listener, clients: Vec::new(), writer, input: Vec::new(), end_of_input: false };
        // Who connected before the process started gets its first word.
        streams.accept();
        Ok(streams)
    }

    /// Copies until `ended` is readable and all output is copied. `limit`: how long the process may
    /// run; `kill` ends it then. `rest` is called once, when nothing has happened for a while.
    pub(crate) fn run(
        &mut self,
        ended: &OwnedFd,
        limit: Option<Duration>,
        kill: &dyn Fn(),
        rest: &dyn Fn(),
    ) -> io::Result<()> {
        let mut deadline = limit.map(|limit| Instant::now() + limit);
        let mut running = true;
        let mut rested = limit.is_some();
        while running || self.endpoints.outputs.iter().any(Option::is_some) {
            let sources = self.sources(running);
            let quiet = if rested { PollTimeout::NONE } else { PollTimeout::from(QUIET_MILLIS) };
            let timeout = deadline.map_or(quiet, |at| {
                PollTimeout::try_from(at.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX)
            });
            let ready = {
                let mut polled: Vec<_> = sources.iter().map(|&source| self.poll_fd(source, ended)).collect();
                match poll(&mut polled, timeout) {
                    Err(nix::Error::EINTR) => continue,
                    Err(error) => return Err(error.into()),
                    Ok(0) if !rested => {
                        rested = true;
                        rest();
                    }
                    Ok(_) => {}
                }
                polled.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>()
            };
            if deadline.is_some_and(|at| at <= Instant::now()) {
                if !running {
                    break;
                }
                kill();
                deadline = None;
            }
            for (&source, _) in sources.iter().zip(&ready).filter(|(_, ready)| **ready) {
                if source == Source::End {
                    running = false;
                    self.make_room();
                } else {
                    self.handle(source);
                }
            }
            if !running {
                deadline = Some(Instant::now() + LAST_WORDS_LIMIT);
            }
            self.clients.retain(|client| !client.gone);
        }
        self.finish()
    }

    fn sources(&self, running: bool) -> Vec<Source> {
        let mut sources = Vec::with_capacity(5 + self.clients.len());
        // Those who come are let in before anything is read that they should see.
        if self.listener.is_some() && self.clients.len() < CLIENTS_MAX {
            sources.push(Source::Listener);
        }
        if running {
            sources.push(Source::End);
        }
        if !self.input.is_empty() && self.endpoints.input.is_some() {
            sources.push(Source::Input);
        }
        if self.clients.iter().all(|client| client.pending.is_empty()) {
            sources.extend((0..2).filter(|&slot| self.endpoints.outputs[slot].is_some()).map(Source::Output));
        }
        let wanted = |client: &Client| !client.pending.is_empty() || (client.open && self.input.is_empty());
        sources.extend((0..self.clients.len()).filter(|&slot| wanted(&self.clients[slot])).map(Source::Client));
        sources
    }

    fn poll_fd<'a>(&'a self, source: Source, ended: &'a OwnedFd) -> PollFd<'a> {
        let (fd, flags): (BorrowedFd<'a>, PollFlags) = match source {
            Source::End => (ended.as_fd(), PollFlags::POLLIN),
            Source::Listener => (self.listener.as_ref().expect("it is polled").as_fd(), PollFlags::POLLIN),
            Source::Input => (self.endpoints.input.as_ref().expect("it is polled").as_fd(), PollFlags::POLLOUT),
            Source::Output(slot) => {
                (self.endpoints.outputs[slot].as_ref().expect("it is polled").as_fd(), PollFlags::POLLIN)
            }
            Source::Client(slot) => {
                let client = &self.clients[slot];
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLOUT, !client.pending.is_empty());
                flags.set(PollFlags::POLLIN, client.open && self.input.is_empty());
                (client.socket.as_fd(), flags)
            }
        };
        PollFd::new(fd, flags)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::End => {}
            Source::Listener => self.accept(),
            Source::Input => self.feed(),
            Source::Output(slot) => self.copy_output(slot),
            Source::Client(slot) => {
                self.clients[slot].flush();
                self.receive(slot);
            }
        }
    }

    fn accept(&mut self) {
        while self.clients.len() < CLIENTS_MAX {
            let Some(Ok((socket, _))) = self.listener.as_ref().map(UnixListener::accept) else { return };
            if socket.set_nonblocking(true).is_ok() {
                self.clients.push(Client {
                    socket,
                    received: Vec::new(),
                    pending: Vec::new(),
                    open: true,
                    gone: false,
                });
            }
        }
    }

    /// Copies what one output has; closes it at its end.
    fn copy_output(&mut self, slot: usize) {
        let Some(fd) = &self.endpoints.outputs[slot] else { return };
        let mut buffer = [0; OUTPUT_LEN_MAX];
        let len = match read(fd, &mut buffer) {
            Ok(len) if len > 0 => len,
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => return,
            // A terminal that nobody has open any more says so by an error.
            Ok(_) | Err(_) => {
                self.endpoints.outputs[slot] = None;
                return;
            }
        };
        let (stream, number) = if slot == 0 { (Stream::Stdout, 1) } else { (Stream::Stderr, 2) };
        if let Some(writer) = &mut self.writer {
            // With a full disk output is lost rather than the container stalled.
            let _ = writer.write(stream, &buffer[..len], now());
        }
        let header = u32::try_from(len).unwrap_or(0).to_be_bytes();
        for client in &mut self.clients {
            client.pending.extend_from_slice(&[number, 0, 0, 0]);
            client.pending.extend_from_slice(&header);
            client.pending.extend_from_slice(&buffer[..len]);
            client.flush();
        }
    }

    /// Takes frames from someone attached, one's input at a time.
    fn receive(&mut self, slot: usize) {
        if !self.input.is_empty() || !self.clients[slot].open {
            return;
        }
        let client = &mut self.clients[slot];
        let mut buffer = [0; INPUT_LEN_MAX + FRAME_HEADER_LEN];
        match client.socket.read(&mut buffer) {
            Ok(0) => client.open = false,
            Ok(len) => client.received.extend_from_slice(&buffer[..len]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(_) => client.gone = true,
        }
        while let Some((kind, bytes)) = self.clients[slot].next_frame() {
            match kind {
                0 if self.endpoints.input.is_some() => self.input.extend_from_slice(&bytes),
                1 => self.end_of_input = true,
                2 => self.resize(&bytes),
                _ => {}
            }
        }
        self.feed();
    }

    fn resize(&self, bytes: &[u8]) {
        if let (true, Some(fd), &[r0, r1, c0, c1]) = (self.endpoints.terminal, &self.endpoints.outputs[0], bytes) {
            // A terminal that is gone needs no size.
            let _ = sys::set_terminal_size(fd, u16::from_be_bytes([r0, r1]), u16::from_be_bytes([c0, c1]));
        }
    }

    /// Gives the process what input there is; closes its input at the end.
    fn feed(&mut self) {
        while !self.input.is_empty() {
            let Some(fd) = &self.endpoints.input else {
                self.input.clear();
                return;
            };
            match write(fd, &self.input) {
                Ok(len) => drop(self.input.drain(..len)),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return,
                // It does not read any more.
                Err(_) => self.endpoints.input = None,
            }
        }
        if self.end_of_input && !self.endpoints.terminal {
            self.endpoints.input = None;
        }
    }

    /// Makes all that is left fit into the sockets: the end waits for nobody who is slow to read.
    fn make_room(&mut self) {
        for client in &mut self.clients {
            // Without it the end waits for the client, if not for long.
            let _ = nix::sys::socket::setsockopt(&client.socket, nix::sys::socket::sockopt::SndBufForce, &LAST_ROOM);
            client.flush();
        }
    }

    /// Writes what is left to the log and to those attached.
    fn finish(&mut self) -> io::Result<()> {
        if let Some(writer) = &mut self.writer {
            // A full disk must not keep the exit code from being told.
            let _ = writer.finish(now());
        }
        self.accept();
        self.listener = None;
        for client in &mut self.clients {
            client.socket.set_nonblocking(false)?;
            client.socket.set_write_timeout(Some(CLIENTS_LIMIT))?;
            // One that does not read loses the rest.
            let _ = client.socket.write_all(&client.pending);
        }
        self.clients.clear();
        Ok(())
    }
}

impl Client {
    fn flush(&mut self) {
        while !self.pending.is_empty() && !self.gone {
            match self.socket.write(&self.pending) {
                Ok(len) => drop(self.pending.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
        }
        self.pending.shrink_to(0);
    }

    fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let &[kind, l0, l1, l2, l3] = self.received.first_chunk::<FRAME_HEADER_LEN>()?;
        let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if len > INPUT_LEN_MAX {
            self.gone = true;
            return None;
        }
        if self.received.len() < FRAME_HEADER_LEN + len {
            return None;
        }
        let bytes = self.received[FRAME_HEADER_LEN..FRAME_HEADER_LEN + len].to_vec();
        self.received.drain(..FRAME_HEADER_LEN + len);
        Some((kind, bytes))
    }
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use nix::unistd::pipe;

    use super::*;

    #[test]
    fn input_comes_in_and_output_goes_to_all_who_are_attached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("io.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut first = UnixStream::connect(&path).unwrap();
        let mut second = UnixStream::connect(&path).unwrap();
        let (out_read, out_write) = pipe().unwrap();
        let (in_read, in_write) = pipe().unwrap();
        let (end_read, end_write) = pipe().unwrap();
        let endpoints = Endpoints { outputs: [Some(out_read), None], input: Some(in_write), terminal: false };
        let watcher = std::thread::spawn(move || {
            Streams::new(endpoints, Some(listener), None).unwrap().run(&end_read, None, &|| (), &|| ()).unwrap();
        });
        first.write_all(&frame(FrameKind::Input, b"que")).unwrap();
        // In pieces, as it may come.
        let rest = [frame(FrameKind::Input, b"stion"), frame(FrameKind::EndOfInput, b"")].concat();
        for piece in rest.chunks(3) {
            first.write_all(piece).unwrap();
        }
        let mut question = String::new();
        std::fs::File::from(in_read).read_to_string(&mut question).unwrap();
        assert_eq!(question, "question");
        write(&out_write, b"answer").unwrap();
        drop(out_write);
        drop(end_write);
        watcher.join().unwrap();
        for socket in [&mut first, &mut second] {
            let mut got = Vec::new();
            socket.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"\x01\0\0\0\0\0\0\x06answer");
        }
    }

    #[test]
    fn one_who_does_not_read_holds_the_output_up_and_loses_nothing() {
        const LEN: usize = 4 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("io.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut slow = UnixStream::connect(&path).unwrap();
        let (out_read, out_write) = pipe().unwrap();
        let (end_read, end_write) = pipe().unwrap();
        let endpoints = Endpoints { outputs: [Some(out_read), None], input: None, terminal: false };
        let watcher = std::thread::spawn(move || {
            Streams::new(endpoints, Some(listener), None).unwrap().run(&end_read, None, &|| (), &|| ()).unwrap();
        });
        let writer = std::thread::spawn(move || {
            let mut out = std::fs::File::from(out_write);
            out.write_all(&vec![b'x'; LEN]).unwrap();
            drop(end_write);
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!writer.is_finished(), "the writer waits");
        let mut got = Vec::new();
        slow.read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        watcher.join().unwrap();
        assert_eq!(got.iter().filter(|&&byte| byte == b'x').count(), LEN);
    }
}
