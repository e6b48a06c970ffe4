"""What tests are made with, where it needs tests of its own."""
