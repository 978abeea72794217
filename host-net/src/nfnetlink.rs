//! What the kernel's packet filter says over netlink, taken apart (`linux/netfilter/nfnetlink.h`).

/// Of each message.
pub const HEADER_LEN: usize = 16;
/// What a message's body begins with: family, version, resource.
pub const GENERIC_LEN: usize = 4;
/// Marks of an attribute's kind: it holds others; it is in network order.
const MARKS: u16 = 1 << 15 | 1 << 14;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The messages in what was received: kind and body.
#[must_use]
pub fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (bytes.first_chunk::<4>(), u16_at(bytes, 4)) {
        let Ok(len) = usize::try_from(u32::from_ne_bytes(*len)) else { break };
        let Some(body) = bytes.get(HEADER_LEN..len) else { break };
        found.push((kind, body));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The attributes in `bytes`: kind, whole, and value.
#[must_use]
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8], &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
        let len = usize::from(len);
        let (Some(whole), Some(value)) = (bytes.get(..len), bytes.get(4..len)) else { break };
        found.push((kind & !MARKS, whole, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}
