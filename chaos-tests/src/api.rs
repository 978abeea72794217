//! A client of the Engine API over a kept connection: what an SDK would do, without a process for
//! each request.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::schema;

/// Longer than any command waits for a leader.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// One connection to a daemon.
#[derive(Debug)]
pub struct Api {
    stream: BufReader<UnixStream>,
    checks: bool,
}

/// What a daemon answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Api {
    /// Connects to a daemon's socket; every answer is looked at, whether it has the shape that the API's description gives it.
    pub fn checking(socket: &Path) -> io::Result<Self> {
        Ok(Self { checks: true, ..Self::connect(socket)? })
    }

    /// Connects to a daemon's socket.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream: BufReader::new(stream), checks: false })
    }

    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.call("GET", path, "")
    }

    pub fn post(&mut self, path: &str, body: &Value) -> io::Result<Answer> {
        self.call("POST", path, &body.to_string())
    }

    pub fn delete(&mut self, path: &str) -> io::Result<Answer> {
        self.call("DELETE", path, "")
    }

    fn call(&mut self, method: &str, path: &str, body: &str) -> io::Result<Answer> {
        let answer = self.exchange(method, path, body)?;
        if !self.checks {
            return Ok(answer);
        }
        let faults = schema::faults(method, path, answer.status, &answer.body);
        assert!(
            faults.is_empty(),
            "{method} {path} answers {} with {}:\n{}",
            answer.status,
            answer.body,
            faults.join("\n")
        );
        Ok(answer)
    }

    fn exchange(&mut self, method: &str, path: &str, body: &str) -> io::Result<Answer> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: skep\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| io::Error::other("no status"))?;
        let mut len = 0;
        let mut chunked = false;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                len = value.trim().parse().map_err(io::Error::other)?;
            }
            chunked |= header.starts_with("transfer-encoding:") && header.contains("chunked");
        }
        let mut body = Vec::new();
        if chunked {
            while let len @ 1.. = usize::from_str_radix(&self.line()?, 16).map_err(io::Error::other)? {
                self.stream.by_ref().take(len as u64).read_to_end(&mut body)?;
                self.line()?;
            }
            self.line()?;
        } else {
            self.stream.by_ref().take(len).read_to_end(&mut body)?;
        }
        Ok(Answer { status, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}
