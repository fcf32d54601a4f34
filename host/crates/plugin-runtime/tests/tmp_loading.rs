#[path = "it/loading.rs"]
mod loading;
