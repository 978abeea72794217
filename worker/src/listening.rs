//! Whether a container listens on its ports, as the kernel tells.

use std::collections::BTreeSet;

/// The state of a listening socket in `/proc/PID/net/tcp` (proc(5)).
const LISTEN: &str = "0A";

/// Whether every one of `ports` has a TCP listener in the namespace of `pid`.
pub(crate) fn on_all(pid: i32, ports: &[u16]) -> bool {
    if ports.is_empty() {
        return true;
    }
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
    let listening: BTreeSet<u16> = ["tcp", "tcp6"].iter().flat_map(|file| ports_in(&read(file))).collect();
    ports.iter().all(|port| listening.contains(port))
}

fn ports_in(table: &str) -> Vec<u16> {
    let port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let (_, port) = local.rsplit_once(':')?;
        (state == LISTEN).then(|| u16::from_str_radix(port, 16).ok()).flatten()
    };
    table.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn listeners_are_told_from_connections() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
                     \x20  0: 00000000:1F40 00000000:0000 0A 00000000:00000000\n\
                     \x20  1: 0100007F:0050 0200007F:9C40 01 00000000:00000000\n";
        assert_eq!(super::ports_in(table), [8000]);
    }
}
