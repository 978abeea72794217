//! Where lines go, and the way there.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};
use serde::{Deserialize, Serialize};

use super::tls::{self, Tls};

/// How long anyone elsewhere is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// Whom lines are handed to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    Unix(PathBuf),
    Udp(String),
    Tcp(String),
    Tls(String, Box<Tls>),
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(out, "unix://{}", path.display()),
            Self::Udp(address) => write!(out, "udp://{address}"),
            Self::Tcp(address) => write!(out, "tcp://{address}"),
            Self::Tls(address, tls) => write!(out, "tls://{} ({address})", tls.server),
        }
    }
}

/// `HOST:PORT` of `HOST` with or without a port.
pub(super) fn with_port(text: &str, port: u16) -> Option<String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Some(text.to_owned()),
        None if !text.is_empty() => Some(format!("{text}:{port}")),
        _ => None,
    }
}

impl Address {
    /// With an address for its name: nothing is looked up where a container would wait for it.
    pub(super) fn resolved(&self) -> io::Result<Self> {
        let look_up = |address: &String| {
            let found = address.to_socket_addrs().and_then(|mut all| {
                all.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
            });
            found.map(|found| found.to_string())
        };
        Ok(match self {
            Self::Unix(path) => Self::Unix(path.clone()),
            Self::Udp(address) => Self::Udp(look_up(address)?),
            Self::Tcp(address) => Self::Tcp(look_up(address)?),
            Self::Tls(address, tls) => Self::Tls(look_up(address)?, tls.clone()),
        })
    }
}

/// An open way to somebody.
pub(super) enum Connection {
    Datagrams(UnixDatagram),
    Stream(UnixStream),
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connection {
    pub(super) fn to(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Self::to_socket(path),
            Address::Udp(address) => {
                let socket = UdpSocket::bind("[::]:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
                socket.connect(address)?;
                Ok(Self::Udp(socket))
            }
            Address::Tcp(address) => Ok(Self::Tcp(to_tcp(address)?)),
            Address::Tls(address, tls) => Ok(Self::Tls(Box::new(tls::agree(to_tcp(address)?, tls)?))),
        }
    }

    /// A socket of either kind.
    fn to_socket(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        if let Err(error) = socket.connect(path) {
            if error.raw_os_error() != Some(libc::EPROTOTYPE) {
                return Err(error);
            }
            let stream = UnixStream::connect(path)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            return Ok(Self::Stream(stream));
        }
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::Datagrams(socket))
    }

    /// Hands a message over. Streams are looked at first: the first bytes to somebody who has gone would be lost
    /// without a word.
    pub(super) fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self {
            Self::Datagrams(socket) => return socket.send(message).map(drop),
            Self::Udp(socket) => return socket.send(message).map(drop),
            Self::Stream(_) | Self::Tcp(_) | Self::Tls(_) => {}
        }
        if self.is_closed()? {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        match self {
            Self::Datagrams(_) | Self::Udp(_) => Ok(()),
            Self::Stream(socket) => socket.write_all(message),
            Self::Tcp(socket) => socket.write_all(message),
            Self::Tls(stream) => stream.write_all(message).and_then(|()| stream.flush()),
        }
    }

    /// Whether a stream's other end is gone. What it says unasked has no meaning.
    fn is_closed(&mut self) -> io::Result<bool> {
        self.set_nonblocking(true)?;
        let read = self.read(&mut [0; 256]);
        self.set_nonblocking(false)?;
        match read {
            Ok(len) => Ok(len == 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(_) => Ok(true),
        }
    }

    fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Self::Datagrams(_) | Self::Udp(_) => Ok(()),
            Self::Stream(socket) => socket.set_nonblocking(on),
            Self::Tcp(socket) => socket.set_nonblocking(on),
            Self::Tls(stream) => stream.sock.set_nonblocking(on),
        }
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Datagrams(_) | Self::Udp(_) => Ok(0),
            Self::Stream(socket) => socket.read(buffer),
            Self::Tcp(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }

    /// Waits for an answer that must be this one.
    pub(super) fn await_answer(&mut self, wanted: &[u8]) -> io::Result<()> {
        let mut answer = vec![0; wanted.len()];
        let mut len = 0;
        while len < answer.len() {
            match self.read(&mut answer[len..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => len += read,
            }
        }
        if answer == wanted { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

fn to_tcp(address: &str) -> io::Result<TcpStream> {
    let target = address.to_socket_addrs()?.next();
    let target = target.ok_or_else(|| io::Error::other("the name has no address"))?;
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}
