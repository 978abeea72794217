//! What Skep asks of a host's kernel for networks: namespaces, links and routes over netlink, and
//! rules through `nft`. Each call says in which namespace it means it.
//!
//! It decides nothing: which links and rules there should be is its callers' to know.

mod ipv6;
mod netlink;
mod netns;
pub mod nfnetlink;
mod nft;
pub mod wireguard;

pub use ipv6::{Reach, add_ipv6_address, allow_ipv6, allow_ipv6_in, forward_ipv6, has_ipv6};
pub use netlink::{LOOPBACK_INDEX, Netlink, add_existing_is_fine, link_address, link_index};
pub use netns::{Netns, on_own_thread};
pub use nft::{RuleWatch, apply, changes, close_in_time, drain_changes, has_table, list_table};
