//! The program inside Skep's built-in image, and the init of containers that want one.
//!
//! `whoami [PORT]` serves HTTP: it says which host and container answer. Told to stop, it finishes what
//! it has and tells each client to go, so that none sees a broken connection. `check [PORT]` asks it
//! and is the image's health check. `init -- COMMAND…` runs a command as the first process of a
//! container: passes signals on and reaps what is orphaned.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;

const PORT: u16 = 8000;
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a server that is to stop looks whether it may.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a client may say nothing before a server that is to stop lets go of it.
const IDLE_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let port = || args.get(1).and_then(|port| port.parse().ok()).unwrap_or(PORT);
    match args.first().map(String::as_str) {
        None | Some("whoami") => serve(port()),
        Some("check") => check(port()),
        Some("init") => init(args.iter().skip(1).skip_while(|arg| *arg == "--").cloned().collect()),
        Some(other) => {
            eprintln!("{other:?} is unknown: use whoami [PORT], check [PORT] or init -- COMMAND");
            ExitCode::from(2)
        }
    }
}

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn kill(pid: i32, number: i32) -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

const SIGINT: i32 = 2;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=31;

static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(number: i32) {
    let child = CHILD.load(Ordering::Relaxed);
    if child > 0 {
        // SAFETY: kill touches no memory of ours and may be called from a handler.
        unsafe { kill(child, number) };
    }
}

static STOPPING: AtomicBool = AtomicBool::new(false);
static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn leave(_number: i32) {
    STOPPING.store(true, Ordering::Relaxed);
}

/// Ends the process once it is to stop and nobody is connected any more.
fn leave_when_idle() {
    let mut idle = 0;
    while idle < 2 {
        std::thread::sleep(LOOK_EVERY);
        let done = STOPPING.load(Ordering::Relaxed) && CONNECTIONS.load(Ordering::Relaxed) == 0;
        idle = if done { idle + 1 } else { 0 };
    }
    std::process::exit(0);
}

fn init(command: Vec<String>) -> ExitCode {
    let Some((program, args)) = command.split_first() else { return ExitCode::from(127) };
    let child = match Command::new(program).args(args).process_group(0).spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("{program}: {error}");
            return ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let child = i32::try_from(child.id()).expect("a pid is positive");
    CHILD.store(child, Ordering::Relaxed);
    for number in SIGNALS.filter(|&number| number != SIGKILL && number != SIGCHLD && number != 19) {
        // SAFETY: the handler only loads an atomic and calls kill.
        unsafe { signal(number, pass_on as *const () as usize) };
    }
    loop {
        let mut status = 0;
        // SAFETY: status is ours to write.
        let ended = unsafe { waitpid(-1, &mut status, 0) };
        if ended == child {
            let code = if status & 0x7f == 0 { status >> 8 & 0xff } else { 128 + (status & 0x7f) };
            return ExitCode::from(u8::try_from(code).unwrap_or(255));
        }
    }
}

fn serve(port: u16) -> ExitCode {
    for number in [SIGINT, SIGTERM] {
        // SAFETY: the handler only stores a flag.
        unsafe { signal(number, leave as *const () as usize) };
    }
    // Both families by one socket, where there are both.
    let both = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    let listener = match both.or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("port {port} cannot be served: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("whoami listens on port {port}");
    std::thread::spawn(leave_when_idle);
    for stream in listener.incoming().flatten() {
        CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        std::thread::spawn(move || {
            // A client that is gone needs no answer.
            drop(converse(stream));
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        });
    }
    ExitCode::SUCCESS
}

fn converse(stream: TcpStream) -> std::io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        if reader.buffer().is_empty() {
            await_request(&stream)?;
        }
        let mut limited = (&mut reader).take(16 << 10);
        let mut request = String::new();
        if limited.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut keep = request.trim_end().ends_with("HTTP/1.1");
        let mut header = String::new();
        while limited.read_line(&mut header)? > 2 {
            let lower = header.to_ascii_lowercase();
            if let Some(wish) = lower.strip_prefix("connection:") {
                keep = wish.contains("keep-alive") || (keep && !wish.contains("close"));
            }
            header.clear();
        }
        keep &= !STOPPING.load(Ordering::Relaxed);
        answer(&stream, &request, keep)?;
        if !keep {
            return Ok(());
        }
    }
}

/// Waits for a client's next word; gives up on one that says nothing for long.
fn await_request(stream: &TcpStream) -> std::io::Result<()> {
    let begun = std::time::Instant::now();
    loop {
        stream.set_read_timeout(Some(LOOK_EVERY))?;
        match stream.peek(&mut [0]) {
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                let limit = if STOPPING.load(Ordering::Relaxed) { IDLE_LIMIT } else { PATIENCE };
                if begun.elapsed() > limit {
                    return Err(error);
                }
            }
            found => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return found.map(drop);
            }
        }
    }
}

fn answer(mut stream: &TcpStream, request: &str, keep: bool) -> std::io::Result<()> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut body = format!("Hostname: {}", read("/proc/sys/kernel/hostname"));
    let peer = stream.peer_addr()?;
    body += &format!("RemoteAddr: {}\n", SocketAddr::new(peer.ip().to_canonical(), peer.port()));
    body += &format!("Request: {}\n", request.trim_end());
    for (name, value) in std::env::vars().filter(|(name, _)| name != "PATH" && name != "HOME") {
        body += &format!("Env: {name}={value}\n");
    }
    let connection = if keep { "keep-alive" } else { "close" };
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())
}

fn check(port: u16) -> ExitCode {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut reply = String::new();
        stream.take(64 << 10).read_to_string(&mut reply)?;
        Ok(reply)
    };
    match ask() {
        Ok(reply) if reply.starts_with("HTTP/1.1 200") => ExitCode::SUCCESS,
        Ok(reply) => {
            eprintln!("unexpected reply: {}", reply.lines().next().unwrap_or_default());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("no reply: {error}");
            ExitCode::FAILURE
        }
    }
}
