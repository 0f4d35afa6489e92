"""SGLang servers: started, spoken to, kept in step with the weights, and replaced when they die.

engine → assembly → probe                   the parts at start, each server checked
engine → startup                            servers' start, as it is shown
engine → replies                            samples: asked for, checked, retried
engine → transfer (disk, broadcast, tensor) weights: one transaction over the fleet
broadcast, tensor → stream                  one bucket is sent while the next is gathered
broadcast → server_group → process_group    servers that receive one broadcast together
fleet → roster                              who serves, and what the screen tells of it
fleet → checksums                           whether servers hold the same weights
fleet → member → server_api → http          who serves, and how it is spoken to
servers → process, ray_servers              servers of the run's own
servers → interpreter → installed           the SGLang that they run
servers, interpreter → options              what the user passes on to them
servers, probe, server_api → versions       what each version of SGLang can do
broadcast, tensor → address                 which servers are on this machine
"""
