//! What do the results say? Tables with paired differences, and plots, in one file.
