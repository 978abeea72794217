//! Where output goes: files on this host, and servers elsewhere.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

/// Receives what is sent to a socket of datagrams until it has come to `count` lines.
fn datagrams(socket: &UnixDatagram, count: usize) -> Vec<String> {
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut buffer = vec![0; 64 << 10];
    let mut receive = || {
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    (0..count).map(|_| receive()).collect()
}

#[test]
fn output_is_kept_in_files_that_are_turned_over() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let flags = ["--log-driver", "local", "--log-opt", "max-size=20k", "--log-opt", "max-file=3"];
    host.start_daemon_with(&flags);
    host.import_busybox();
    let driver = |name: &str| host.ok(&["inspect", "-f", "{{.HostConfig.LogConfig.Type}}", name]).trim().to_owned();

    // The daemon's own driver: short records, closed files compressed, all of it read in order.
    // What comes of both outputs at the same time may be read in any order.
    let count = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; sleep 1; echo end >&2";
    host.ok(&["run", "--name", "local", "busybox", "sh", "-c", count]);
    assert_eq!(driver("local"), "local");
    let id = host.ok(&["inspect", "-f", "{{.Id}}", "local"]);
    let dir = host.data().join("containers").join(id.trim());
    assert!(dir.join("output.log.1.gz").exists() && dir.join("output.log.2.gz").exists());
    assert!(!dir.join("output.log.3.gz").exists());
    let kept = host.ok(&["logs", "local"]);
    let numbers: Vec<u32> = kept.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    assert!(numbers.len() > 1000 && numbers.is_sorted() && numbers.last() == Some(&2999), "{}", numbers.len());
    assert_eq!(host.ok(&["logs", "--tail", "2", "local"]), "line 2999\n", "the other one is an error");

    // Lines of JSON lie where other programs look for them.
    host.ok(&["run", "--name", "plain", "--log-driver", "json-file", "busybox", "echo", "shipped"]);
    let told = host.ok(&["inspect", "-f", "{{.Id}} {{.LogPath}}", "plain"]);
    let (id, path) = told.trim().split_once(' ').unwrap();
    assert!(path.ends_with(&format!("/containers/{id}/{id}-json.log")), "{path}");
    assert!(std::fs::read_to_string(path).unwrap().starts_with(r#"{"log":"shipped\n","stream":"stdout","time":""#));
    assert_eq!(host.ok(&["inspect", "-f", "{{.LogPath}}", "local"]).trim(), "");

    let none = host.ok(&["run", "-d", "--log-driver", "none", "busybox", "echo", "unheard"]);
    assert!(host.fails(&["logs", none.trim()]).contains("does not support reading"));
    let why = host.fails(&["run", "--log-driver", "etwlogs", "busybox", "true"]);
    assert!(why.contains("no log driver named 'etwlogs'"), "{why}");
}

fn with_busybox() -> Rig {
    let rig = Rig::new(1);
    rig.host(1).start_daemon();
    rig.host(1).import_busybox();
    rig
}

#[test]
fn output_reaches_syslog_and_the_journal_and_is_kept_here_too() {
    take_turn!();
    let rig = with_busybox();
    let host = rig.host(1);
    // A syslog server of the host's, and one by UDP and by TCP; what is kept here is read as always.
    let log = host.dir().join("messages");
    host.spawn("busybox", &["syslogd", "-n", "-O", log.to_str().unwrap()]);
    let tag = "--log-opt=tag={{.Name}}";
    wait_until("syslogd takes lines", LIMIT, || {
        let run = ["run", "--rm", "--log-driver", "syslog", tag, "busybox", "echo", "are you there"];
        let ran = host.run(&run);
        (ran.success && std::fs::read_to_string(&log).is_ok_and(|text| text.contains("are you there")), ran.stderr)
    });
    let say = "echo to the server; echo badly >&2";
    host.ok(&["run", "--name", "said", "--log-driver", "syslog", tag, "busybox", "sh", "-c", say]);
    wait_until("the server has both lines", LIMIT, || {
        let text = std::fs::read_to_string(&log).unwrap();
        let good = text.lines().any(|line| line.contains("daemon.info said[") && line.ends_with("to the server"));
        (good && text.lines().any(|line| line.contains("daemon.err said[") && line.ends_with("badly")), text)
    });
    assert_eq!(host.ok(&["logs", "said"]), "to the server\n");
    let udp = host.within_network(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    udp.set_read_timeout(Some(LIMIT)).unwrap();
    let address = format!("--log-opt=syslog-address=udp://{}", udp.local_addr().unwrap());
    let format = ["--log-opt", "syslog-format=rfc5424", "--log-opt", "syslog-facility=local7"];
    host.ok(&[&["run", "--log-driver", "syslog", &address], &format[..], &["busybox", "echo", "by UDP"]].concat());
    let mut buffer = [0; 512];
    let len = udp.recv(&mut buffer).unwrap();
    let line = String::from_utf8_lossy(&buffer[..len]).into_owned();
    assert!(line.starts_with("<190>1 2") && line.ends_with(" - by UDP\n"), "{line}");
    let refused = ["run", "--log-driver", "syslog", "--log-opt", "syslog-address=tcp://127.0.0.1:1", "busybox", "true"];
    let why = host.fails(&refused);
    assert!(why.contains("tcp://127.0.0.1:1") && why.contains("refused"), "{why}");

    // The journal's own protocol; a journal that the machine may have is not this host's.
    let hidden = "mkdir -p /run/systemd/journal && mount -t tmpfs none /run/systemd/journal";
    assert!(host.exec("sh", &["-c", hidden]).success);
    let fields = ["--log-driver", "journald", "--log-opt", "labels=team", "--label", "team=bees", "--name", "noted"];
    assert!(host.fails(&[&["run"], &fields[..], &["busybox", "true"]].concat()).contains("journal"));
    host.ok(&["rm", "noted"]);
    let socket = host.dir().join("journal");
    let journal = UnixDatagram::bind(&socket).unwrap();
    assert!(host.exec("ln", &["-s", &socket.to_string_lossy(), "/run/systemd/journal/socket"]).success);
    host.ok(&[&["run"], &fields[..], &["busybox", "echo", "for the journal"]].concat());
    let entry = datagrams(&journal, 1).concat();
    for field in
        ["MESSAGE=for the journal\n", "PRIORITY=6\n", "CONTAINER_NAME=noted\n", "IMAGE_NAME=busybox\n", "TEAM=bees\n"]
    {
        assert!(entry.contains(field), "{entry}");
    }
    assert!(host.exec("rm", &["/run/systemd/journal/socket"]).success);
}

/// A server of TLS in the host that writes down what it hears.
fn listen_by_tls(host: &Host) -> (String, std::path::PathBuf) {
    let (dir, heard) = (host.dir().display().to_string(), host.dir().join("heard"));
    let subject = "-subj /CN=logs -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    let make = format!("openssl req -x509 -newkey rsa:2048 -nodes -keyout {dir}/key.pem -out {dir}/ca.pem {subject}");
    let made = host.exec("sh", &["-c", &make]);
    assert!(made.success, "{made:?}");
    // Its own input never ends.
    let serve = format!("mkfifo {dir}/idle; exec openssl s_server -quiet -accept 127.0.0.1:6514");
    let serve = format!("{serve} -cert {dir}/ca.pem -key {dir}/key.pem <> {dir}/idle > {}", heard.display());
    host.spawn("sh", &["-c", &serve]);
    (format!("{dir}/ca.pem"), heard)
}

#[test]
fn output_goes_to_syslog_by_tls_if_the_server_is_who_it_is_said_to_be() {
    take_turn!();
    let rig = with_busybox();
    let host = rig.host(1);
    let (authority, heard) = listen_by_tls(host);
    let address = "--log-opt=syslog-address=tcp+tls://127.0.0.1:6514";
    let trusted = format!("--log-opt=syslog-tls-ca-cert={authority}");
    let say = |options: &[&str], text: &str| {
        let run = [&["run", "--rm", "--log-driver", "syslog", address], options, &["busybox", "echo", text]].concat();
        host.run(&run)
    };
    wait_until("the server takes lines", LIMIT, || {
        let ran = say(&[&trusted, "--log-opt=syslog-format=rfc5424", "--log-opt=tag=web"], "in secret");
        let heard = std::fs::read_to_string(&heard).unwrap_or_default();
        (ran.success && heard.contains(" - in secret\n"), format!("{ran:?} {heard}"))
    });
    // Each message is told by its length.
    let text = std::fs::read_to_string(&heard).unwrap();
    let line = text.lines().find(|line| line.ends_with("in secret")).unwrap();
    let (len, message) = line.split_once(' ').unwrap();
    assert_eq!(len.parse::<usize>().unwrap(), message.len() + 1, "{text}");
    let unknown = say(&[], "to anybody");
    assert!(!unknown.success && unknown.stderr.contains("certificate"), "{unknown:?}");
    assert!(say(&["--log-opt=syslog-tls-skip-verify=true"], "to anybody").success);
    wait_until("the server has heard it", LIMIT, || {
        let heard = std::fs::read_to_string(&heard).unwrap();
        (heard.contains("to anybody"), heard)
    });
}

#[test]
fn output_reaches_graylog_and_fluentd() {
    take_turn!();
    let rig = with_busybox();
    let host = rig.host(1);
    // GELF, not compressed so that it can be read here.
    let udp = host.within_network(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    udp.set_read_timeout(Some(LIMIT)).unwrap();
    let address = format!("--log-opt=gelf-address=udp://{}", udp.local_addr().unwrap());
    let options = ["--log-opt=gelf-compression-type=none", "--log-opt=labels-regex=^te", "--label=team=bees"];
    let run = ["run", "--name", "grey", "--log-driver", "gelf", &address];
    host.ok(&[&run[..], &options, &["busybox", "echo", "to graylog"]].concat());
    let mut buffer = [0; 4096];
    let len = udp.recv(&mut buffer).unwrap();
    let message: serde_json::Value = serde_json::from_slice(&buffer[..len]).unwrap();
    for (name, want) in
        [("short_message", "to graylog"), ("_container_name", "grey"), ("_image_name", "busybox"), ("_team", "bees")]
    {
        assert_eq!(message[name], want, "{message}");
    }
    assert_eq!(host.ok(&["logs", "grey"]), "to graylog\n");

    // Fluentd, which says that it has the line.
    let listener = host.within_network(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("--log-opt=fluentd-address={}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        // The first is whoever looks whether somebody is there.
        let mut client = listener.incoming().flatten().nth(1).unwrap();
        let mut buffer = [0; 4096];
        let len = client.read(&mut buffer).unwrap();
        type Record = BTreeMap<String, String>;
        let (tag, _, record, option): (String, u64, Record, Record) = rmp_serde::from_slice(&buffer[..len]).unwrap();
        client.write_all(&rmp_serde::to_vec(&BTreeMap::from([("ack", &option["chunk"])])).unwrap()).unwrap();
        (tag, record)
    });
    let options = ["--log-opt=fluentd-request-ack=true", "--log-opt=tag={{.Name}}"];
    let run = ["run", "--name", "fluent", "--log-driver", "fluentd", &address];
    host.ok(&[&run[..], &options, &["busybox", "sh", "-c", "echo to fluentd >&2"]].concat());
    let (tag, record) = server.join().unwrap();
    assert_eq!((tag.as_str(), record["log"].as_str(), record["source"].as_str()), ("fluent", "to fluentd", "stderr"));
    // Without a server nothing starts, unless nobody minds.
    let gone = ["run", "--rm", "--log-driver", "fluentd", "--log-opt=fluentd-address=127.0.0.1:1"];
    let why = host.fails(&[&gone[..], &["busybox", "true"]].concat());
    assert!(why.contains("tcp://127.0.0.1:1") && why.contains("refused"), "{why}");
    host.ok(&[&gone[..], &["--log-opt=fluentd-async=true", "busybox", "true"]].concat());
}

/// Reads one request, whose head and body are told, and answers it.
fn serve(client: &mut TcpStream, status: &str) -> Option<(String, String)> {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok()).unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let text = r#"{"text":"told","code":0}"#;
    write!(client, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{text}", text.len()).unwrap();
    Some((head, String::from_utf8(body).unwrap()))
}

#[test]
fn output_reaches_a_collector_of_splunk_s() {
    take_turn!();
    let rig = with_busybox();
    let host = rig.host(1);
    let listener = host.within_network(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("--log-opt=splunk-url=http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let mut clients = listener.incoming().flatten();
        // Whoever looks whether the token is taken: once in vain.
        assert!(serve(&mut clients.next().unwrap(), "403 Forbidden").unwrap().0.starts_with("OPTIONS /services/"));
        serve(&mut clients.next().unwrap(), "200 OK").unwrap();
        let mut client = clients.next().unwrap();
        let mut events = Vec::new();
        while let Some((head, body)) = serve(&mut client, "200 OK") {
            assert!(head.contains("Authorization: Splunk secret\r\n") && head.contains(" HTTP/1.1\r\n"), "{head}");
            let told = serde_json::Deserializer::from_str(&body).into_iter::<serde_json::Value>();
            events.push(told.map(Result::unwrap).collect::<Vec<_>>());
        }
        events
    });
    let options = ["--log-opt=splunk-token=secret", "--log-opt=splunk-index=main", "--log-opt=tag={{.Name}}"];
    let run = [&["run", "--name", "chatty", "--log-driver", "splunk", &address][..], &options].concat();
    let refused = host.fails(&[&run[..], &["busybox", "true"]].concat());
    assert!(refused.contains("the collector answers 403"), "{refused}");
    host.ok(&["rm", "chatty"]);
    let script = "seq 1 1000; sleep 0.3; echo; echo later >&2";
    host.ok(&[&run[..], &["busybox", "sh", "-c", script]].concat());
    let batches = server.join().unwrap();
    assert!(batches.len() < 200, "lines go together: {}", batches.len());
    let events: Vec<_> = batches.into_iter().flatten().collect();
    let lines: Vec<_> = events.iter().map(|event| event["event"]["line"].as_str().unwrap().to_owned()).collect();
    let wanted = (1..=1000).map(|number| number.to_string()).chain(["later".to_owned()]);
    assert!(lines.iter().cloned().eq(wanted), "{lines:?}");
    let last = events.last().unwrap();
    assert_eq!((&last["event"]["source"], &last["event"]["tag"]), (&"stderr".into(), &"chatty".into()), "{last}");
    assert_eq!(last["index"], "main", "{last}");
    assert_eq!(host.ok(&["logs", "chatty"]).lines().count(), 1001, "kept here as well, but for what is an error");
}
