"""Measurements and the demonstration: real servers, real photographs."""
