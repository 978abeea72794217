//! `docs/COMPATIBILITY.md` against a daemon: what it says is there is there, and the rest is refused.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Rig, take_turn};

const TABLE: &str = include_str!("../../docs/COMPATIBILITY.md");
/// Of the Engine API's description, version 1.56.
const OPERATIONS: usize = 108;
/// What would end the test, or never ends.
const NOT_ASKED: [&str; 3] = ["POST /swarm/init", "GET /events", "POST /swarm/leave"];

#[test]
fn every_operation_answers_as_the_table_says() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.ok(&["swarm", "init"]);
    let rows: Vec<(&str, &str)> = TABLE.lines().filter_map(row).collect();
    assert_eq!(rows.len(), OPERATIONS);
    let mut lies = Vec::new();
    for (operation, verdict) in rows.into_iter().filter(|(operation, _)| !NOT_ASKED.contains(operation)) {
        let (method, path) = operation.split_once(' ').unwrap();
        let path = path.replace("{id}", "no-such-thing").replace("{name}", "no-such-thing");
        let url = format!("http://localhost/v1.50{path}");
        let socket = host.socket();
        let mut args =
            vec!["-s", "-m", "20", "-w", "\n%{http_code}", "--unix-socket", socket.trim_start_matches("unix://")];
        if method == "HEAD" {
            args.push("-I");
        } else {
            args.extend(["-X", method]);
        }
        if matches!(method, "POST" | "PUT") {
            args.extend(["-H", "Content-Type: application/json", "-d", "{}"]);
        }
        args.push(&url);
        let answer = host.exec("curl", &args).stdout;
        let (body, status) = answer.rsplit_once('\n').unwrap();
        let absent = status == "501" || body.contains("not supported yet by this version") || status == "405";
        if absent != (verdict == "refused") || status == "000" {
            lies.push(format!("{operation} is said to be {verdict}: {status} {body}"));
        }
    }
    assert!(lies.is_empty(), "{}", lies.join("\n"));
}

/// `| `GET /path` | works | note |`
fn row(line: &str) -> Option<(&str, &str)> {
    let mut cells = line.strip_prefix("| `")?.split(" | ");
    Some((cells.next()?.strip_suffix('`')?, cells.next()?))
}
