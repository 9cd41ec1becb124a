//! A new file in `migrations` is a change: the binary has all of them, and cargo would not look for others.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
